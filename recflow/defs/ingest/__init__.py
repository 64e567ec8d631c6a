"""Raw logs into daily tables."""

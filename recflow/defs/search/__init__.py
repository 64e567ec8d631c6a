"""The search for a better training configuration."""

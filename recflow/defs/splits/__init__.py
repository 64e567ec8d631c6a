"""Training snapshots: a window of days split by time."""

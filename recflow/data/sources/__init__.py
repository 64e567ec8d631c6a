"""Readers of log formats; each yields the same two tables."""

"""Cleaned tables and the quarantine."""

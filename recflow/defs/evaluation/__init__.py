"""Predictions, measurements and the report."""

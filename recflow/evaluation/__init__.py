"""Metrics, baselines, significance, and the report."""

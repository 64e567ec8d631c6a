"""Dagster glue, one folder a stage."""

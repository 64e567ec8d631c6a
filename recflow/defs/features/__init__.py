"""Validated features."""

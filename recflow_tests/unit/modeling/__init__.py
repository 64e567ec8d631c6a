"""Tests of recflow.modeling."""

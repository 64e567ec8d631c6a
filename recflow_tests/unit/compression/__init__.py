"""Tests of recflow.compression."""

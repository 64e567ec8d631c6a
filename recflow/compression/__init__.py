"""Smaller versions of a trained model, and what they lose."""

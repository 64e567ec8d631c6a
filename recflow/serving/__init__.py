"""Answering requests: a model with all it needs to be asked, and the answers."""

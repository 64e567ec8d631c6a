"""The model that meets a budget."""

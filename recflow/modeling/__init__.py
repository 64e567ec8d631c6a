"""The text encoder, the user model, and their training."""

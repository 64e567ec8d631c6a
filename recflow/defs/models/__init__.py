"""The fine-tuned model and the family of smaller ones."""

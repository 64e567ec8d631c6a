"""Studies: what a choice of the training engine costs and gains."""

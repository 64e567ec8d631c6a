"""Whether data is fit to train on."""

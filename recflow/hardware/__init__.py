"""What training and serving a text recommender takes of which device, before it is run."""

"""What every other package may rely on: contracts, artifacts, errors, seeds."""

"""A text-based recommender from raw click logs to an evaluated, affordable model."""

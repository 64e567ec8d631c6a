"""From raw logs to the two tables, features and splits."""

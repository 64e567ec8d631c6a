"""Stage: how the days drift, and what follows from it."""

"""The evaluation report: one HTML file, one JSON file."""

"""Assets that watch the days: is a day still like the days the champion was made from."""

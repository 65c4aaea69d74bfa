"""The promises proved with a user's own training: run without measurement, twice, and with it."""

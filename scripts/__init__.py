"""Things that a person runs."""

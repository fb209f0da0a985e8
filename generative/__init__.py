"""Models that dream: one family, one file."""

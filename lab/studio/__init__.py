"""The studio: a page on this machine where runs are followed; the tracks bring pages of their own, to watch agents and to sample images."""

"""Agents that play: one algorithm, one file."""

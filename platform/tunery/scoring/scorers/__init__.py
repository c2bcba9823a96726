"""Scorers: one file an algorithm; table.py says which there are."""

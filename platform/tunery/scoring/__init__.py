"""Scorers, and the pass over the shards of a dataset: the `score` stage."""

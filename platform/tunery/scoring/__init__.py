"""The `score` stage: scorers, and the passes that apply them to the shards of a dataset."""

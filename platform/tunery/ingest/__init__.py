"""The `dataset` stage: reads rows from files, hub datasets and the builtin corpus."""

"""Files, hub datasets and the builtin corpus to rows: the `dataset` stage."""

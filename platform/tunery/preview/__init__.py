"""`tunery preview`: the tokenized rows of a stage."""

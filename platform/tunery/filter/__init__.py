"""`tunery filter`: filters the rows of files without an experiment file."""

"""`tunery filter`: filter the rows of files without writing an experiment file."""

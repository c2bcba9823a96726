"""`tunery filter`: files in, good rows out."""

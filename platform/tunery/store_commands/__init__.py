"""`tunery store`: list, verify and clean the artifacts of a store."""

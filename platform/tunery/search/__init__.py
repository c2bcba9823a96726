"""Ray Tune over an experiment: the space, the trial, and the search as a whole."""

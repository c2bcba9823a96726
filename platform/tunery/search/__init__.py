"""Hyperparameter search over an experiment with Ray Tune."""

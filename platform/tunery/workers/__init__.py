"""Processes that run the work of stages: the workers of a run, and their state between stages."""

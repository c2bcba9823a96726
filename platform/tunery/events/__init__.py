"""The event log of a run, and the run's state that is reduced from it."""

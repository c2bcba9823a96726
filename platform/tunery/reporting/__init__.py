"""The event log, and what is drawn from it: terminal, W&B, report."""

"""Outputs rendered from the event log: terminal, HTML report, W&B, summary tables."""

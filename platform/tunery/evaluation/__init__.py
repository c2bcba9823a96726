"""Measuring models on held-out rows."""

"""Scorers: one module per algorithm; spec/scorers.py has the registry."""

"""Scorers: one module per algorithm; spec/scorers/ has their configs and the registry."""

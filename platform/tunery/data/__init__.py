"""Rows: reading, damaging on purpose, scoring, selecting."""

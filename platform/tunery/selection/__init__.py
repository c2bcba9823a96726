"""Selecting: which rows of a scored dataset go on, by rules, quotas and how alike they are."""

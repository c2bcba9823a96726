"""The `select` stage: filters the rows of a scored dataset by rules, quotas and diversity."""

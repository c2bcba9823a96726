"""Validate, plan and execute the stages of an experiment. Cached stages are skipped."""

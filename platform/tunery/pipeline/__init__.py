"""From an experiment to artifacts: check, plan, run; what is done already is skipped."""

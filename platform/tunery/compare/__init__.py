"""`tunery compare`: two runs, or two trials, side by side."""

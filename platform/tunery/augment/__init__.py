"""Prompts built from the data itself: templates, examples, chains of thought; never from held-out rows."""

"""Prompt augmentation: templates, few-shot examples and chain of thought, without held-out rows."""

"""Prompt augmentation: templates, few-shot examples and chain of thought, never using held-out rows."""

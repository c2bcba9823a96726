"""Fixtures for tests that load experiment files, and settings of hypothesis."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from experiment_text import LoadText
from hypothesis import settings

from tunery.spec import Experiment, load
from tunery.spec.yaml_source import YamlSource

# No deadline: an example may be slow because the machine is busy.
settings.register_profile("quick", deadline=None, max_examples=30)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def load_text(tmp_path: Path) -> LoadText:
    """Load an experiment from its text, as the file exp.yaml in tmp_path."""

    def load_it(text: str) -> tuple[Experiment, YamlSource]:
        path = tmp_path / "exp.yaml"
        path.write_text(text, encoding="utf-8")
        return load(path)

    return load_it

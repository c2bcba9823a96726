"""Type of the fixture that loads an experiment from its text."""

from __future__ import annotations

from collections.abc import Callable

from tunery.spec import Experiment
from tunery.spec.yaml_source import YamlSource

LoadText = Callable[[str], tuple[Experiment, YamlSource]]

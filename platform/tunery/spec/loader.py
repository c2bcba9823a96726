"""Load and validate an experiment file. Errors name the file, the line, the value, the cause and the remedy.

`load` validates everything that depends only on the text: schema, references, cycles, input types of stages, and the
search space with every choice. Files and models are validated in pipeline/validate.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from tunery.errors import RequestError, SpecError, SpecErrors
from tunery.spec.check_references import check_references, check_scores
from tunery.spec.check_search import check_search
from tunery.spec.error_messages import kind_of, translate_all
from tunery.spec.experiment import Experiment
from tunery.spec.yaml_source import YamlSource, read_yaml


def load(path: Path) -> tuple[Experiment, YamlSource]:
    """Load the experiment in `path`. Raises RequestError if it can't be read, SpecErrors if it is invalid."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"there is no file {path}", remedy="use the path of an experiment file (.yaml)") from None
    except IsADirectoryError:
        raise RequestError(f"{path} is a folder", remedy="use the path of an experiment file (.yaml)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} can't be read: {error}", remedy="an experiment is a UTF-8 text file") from None
    source = read_yaml(text, str(path))
    return parse(source), source


def parse(source: YamlSource) -> Experiment:
    """Validate `source` and build the experiment. Raises SpecErrors with all errors of the first failing check."""
    if not isinstance(source.data, dict):
        problem = "is empty" if source.data is None else f"contains {kind_of(source.data)}"
        remedy = "an experiment is a mapping with name, seed and stages"
        raise SpecErrors([SpecError(f"the file {problem}", file=source.file, line=1, remedy=remedy)])
    try:
        experiment = Experiment.model_validate_json(json.dumps(source.data), strict=True)
    except ValidationError as error:
        raise SpecErrors(translate_all(error.errors(), source)) from None
    for check in (check_references, check_scores, check_search):
        if errors := list(check(experiment, source)):
            raise SpecErrors(errors)
    return experiment

"""Checks of trainings and win rates before a run: the rows have a format that the stage can use, a reward model or
judge has a single output, and a Python reward function exists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunery.errors import SpecError
from tunery.ingest.read import first_row_format, source_label
from tunery.ingest.sources import BUILTIN, BadSource, sources_of
from tunery.models.labels import Labels, labels_of_folder
from tunery.models.model_folder import BadModel
from tunery.pipeline.cache_keys import model_folder
from tunery.spec import STAGE_KINDS, TRAINERS, Experiment, Pretrained, PythonReward, Training
from tunery.spec.error_messages import error_at
from tunery.spec.graph import root_dataset
from tunery.spec.trainings import data_refs
from tunery.spec.yaml_source import YamlSource


def validate_row_formats(
    name: str, stage: Any, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """Yield an error for each data field whose rows have an unsupported format, judged by the first row of the dataset
    that they come from."""
    requirement = STAGE_KINDS[stage.kind].requirement
    for field in ("data", "eval_data"):
        data = getattr(stage, field, None)
        if requirement is None or not isinstance(data, str | dict):
            continue
        for path, rows in data_refs(data).items():
            root = root_dataset(experiment.stages, rows)
            try:
                shape = first_row_format(root, folder)
            except BadSource:  # reported for the dataset
                continue
            if shape not in requirement.formats:
                what = f"subset `{root.subset}`" if BUILTIN in sources_of(root) else f"`{source_label(root)}`"
                yield error_at(
                    source,
                    ("stages", name, field, *path),
                    f"`{'.'.join((name, field, *path))}` needs {requirement.what}, but {what} holds {_PLURALS[shape]}",
                    cause=requirement.cause,
                    remedy=requirement.remedy,
                )


_PLURALS = {
    "text": "texts",
    "prompt": "prompts",
    "conversation": "conversations",
    "preference": "preference pairs",
    "rated": "rated answers",
}


def validate_rewards(
    name: str, stage: Any, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """Yield the errors of the `reward` of a training and of the `judge` of a win rate."""
    for item in stage.model_refs():
        if item.role != "reward":
            continue
        reward: str | Pretrained | PythonReward = item.model
        try:
            if isinstance(reward, PythonReward):
                _check_function(reward, folder)
            elif (labels := known_labels(reward, experiment, folder)) is not None:
                labels.check_single(reward if isinstance(reward, str) else reward.pretrained)
        except BadModel as error:
            field = ".".join(map(str, (name, *item.path)))
            at = ("stages", name, *item.path)
            yield error_at(source, at, f"`{field}`: {error.message}", cause=error.cause, remedy=error.remedy)


def known_labels(model: str | Pretrained, experiment: Experiment, folder: Path) -> Labels | None:
    """Return the labels of the classifier that a stage trains or that is stored in a folder. None for a model on the
    hub, which is checked when it is loaded, and for a stage that trains no classifier. Raises BadModel for a folder
    without a classification head."""
    if isinstance(model, Pretrained):
        return labels_of_folder(model_folder(model, folder)) if model.is_folder else None
    stage = experiment.stages[model]
    if not isinstance(stage, Training) or not (spec := TRAINERS[stage.kind]).labels:
        return None
    temperature = 1.0 if spec.fits_temperature and stage.eval_data is not None else None
    return Labels(spec.labels, len(spec.labels) == 1, temperature)


def _check_function(reward: PythonReward, folder: Path) -> None:
    """Raise BadModel if the file does not define the function. The file is parsed, not executed."""
    path = folder / reward.python
    signature = f"def {reward.function}(prompts: list[str], responses: list[str]) -> list[float]"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadModel(
            f"`{reward.python}` can't be read", str(error), "paths are relative to the experiment's folder"
        ) from None
    except SyntaxError as error:
        raise BadModel(f"`{reward.python}` is no Python: line {error.lineno}", str(error.msg), "correct it") from None
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if reward.function not in names:
        raise BadModel(
            f"`{reward.python}` has no function `{reward.function}`",
            f"it has: {', '.join(names) or 'none'}",
            f"write `{signature}`, or name another as `function`",
        )

"""What can be checked of an experiment without running it, beyond its text: files, columns, models, batches, store.

Nothing here starts Ray, imports torch or writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunery.data.read import BUILTIN, BadSource, check_source, first_shape
from tunery.errors import RequestError, SpecError, SpecErrors
from tunery.models.check import BadModel, check_model_folder
from tunery.runner.identity import model_folder, pretrained_models
from tunery.spec import Dataset, Experiment, Score, Select, Sft, Stage, Training
from tunery.spec.load import error_at
from tunery.spec.overrides import with_overrides
from tunery.spec.yaml_source import YamlSource
from tunery.store import Store
from tunery.train.batches import plan_batches

MOST_COMBINATIONS = 10_000


def check(experiment: Experiment, source: YamlSource, store: Store, workers: int, trial_workers: int) -> None:
    """Raises SpecErrors with file and line, or StoreError."""
    folder = Path(source.file).parent
    errors: list[SpecError] = []
    for name, stage in experiment.stages.items():
        errors += _check_stage(name, stage, experiment, source, folder)
        errors += _check_batches(name, stage, experiment, source, workers)
    if not errors:
        errors += _check_space(experiment, source, trial_workers)
    if errors:
        raise SpecErrors(errors)
    store.check_writable()


def _check_stage(
    name: str, stage: Stage, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    at = ("stages", name)
    if isinstance(stage, Dataset):
        try:
            check_source(stage, folder)
        except BadSource as error:
            yield error_at(
                source, (*at, error.field), f"{name}: {error.message}", cause=error.cause, remedy=error.remedy
            )
    for model in pretrained_models(stage):
        if model.is_folder:
            try:
                check_model_folder(model_folder(model, folder))
            except BadModel as error:
                yield error_at(source, at, f"{name}: {error.message}", cause=error.cause, remedy=error.remedy)
    if isinstance(stage, Sft):
        for field in ("data", "eval_data"):
            if (data := getattr(stage, field)) is not None:
                yield from _check_has_answers(name, field, data, experiment, source, folder)


def _check_has_answers(
    name: str, field: str, data: str, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """sft learns answers: the rows at the root of its data must have some."""
    root = _root(experiment, data)
    try:
        shape = first_shape(root, folder)
    except BadSource:  # told at the dataset
        return
    if shape in ("text", "prompt"):
        what = f"subset `{root.subset}`" if root.source == BUILTIN else f"`{root.source}`"
        yield error_at(
            source,
            ("stages", name, field),
            f"`{name}.{field}` needs conversations with answers, but {what} holds {shape}s",
            cause="sft counts the loss of answers only",
            remedy="use rows with question and answer, or train on texts with `kind: pretrain`",
        )


def _root(experiment: Experiment, name: str) -> Dataset:
    stage = experiment.stages[name]
    while isinstance(stage, Score | Select):
        stage = experiment.stages[stage.data]
    assert isinstance(stage, Dataset), "checked by spec.load: only these give rows"
    return stage


def _check_batches(
    name: str, stage: Stage, experiment: Experiment, source: YamlSource, workers: int
) -> Iterator[SpecError]:
    if isinstance(stage, Training) and stage.global_batch_size != "auto":
        micro = experiment.compute.micro_batch_size
        try:
            plan_batches(1, 1, stage.global_batch_size, workers, None if micro == "auto" else micro)
        except RequestError as error:
            at = ("stages", name, "global_batch_size")
            yield error_at(source, at, f"{name}: {error.message}", cause=error.cause, remedy=error.remedy)


def _check_space(experiment: Experiment, source: YamlSource, workers: int) -> Iterator[SpecError]:
    """Every combination of choices (and ends of ranges) must be an experiment whose batches can be shared out."""
    if experiment.search is None:
        return
    names = list(experiment.search.space)
    values = [dimension.values for dimension in experiment.search.space.values()]
    for combination in itertools.islice(itertools.product(*values), MOST_COMBINATIONS):
        overrides: dict[str, Any] = dict(zip(names, combination, strict=True))
        trial = with_overrides(experiment, overrides)
        for path in names:
            name = path.split(".")[0]
            for error in _check_batches(name, trial.stages[name], trial, source, workers):
                yield error_at(
                    source, ("search", "space", path), f"a trial with {overrides}: {error.message}", remedy=error.remedy
                )
                return

"""Checks of a search before a run: every combination of values gives valid stages, and earlier runs exist."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunery.errors import SpecError
from tunery.pipeline.validate_stage import validate_batches, validate_stage
from tunery.spec import Augment, Dataset, Dimension, Experiment
from tunery.spec.error_messages import error_at, nearest
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource
from tunery.store import Store

MAX_COMBINATIONS = 10_000


def validate_space(experiment: Experiment, source: YamlSource, folder: Path, workers: int) -> Iterator[SpecError]:
    """Check that every combination of enumerated values (and ends of ranges) gives an experiment whose files exist and
    whose batches divide evenly among the workers of a trial. Reports the first that does not."""
    if experiment.search is None:
        return
    space = experiment.search.space
    checked: set[str] = set()
    values = [_values(path, dimension) for path, dimension in space.items()]
    for combination in itertools.islice(itertools.product(*values), MAX_COMBINATIONS):
        point = dict(zip(space, combination, strict=True))
        overrides: dict[str, Any] = {path: value for path, value in point.items() if space[path].is_active(point)}
        try:
            trial = with_overrides(experiment, overrides)
        except ValueError as error:
            cause = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            remedy = (
                "" if isinstance(error, ValidationError) else "make one of them conditional on the other with `when`"
            )
            message = f"no trial can have {overrides} together"
            yield error_at(source, ("search", "space"), message, cause=cause, remedy=remedy)
            return
        invalid = _first_invalid_stage(trial, experiment, source, folder, workers, checked)
        if invalid is not None:
            name, stage_error = invalid
            searched = {path: value for path, value in overrides.items() if path.split(".")[0] == name}
            with_values = f"with {searched} " if searched else ""
            message = f"a trial {with_values}is not valid: {stage_error.message}"
            yield error_at(
                source, _error_path(name, space), message, cause=stage_error.cause, remedy=stage_error.remedy
            )
            return


def check_trial(
    trial: Experiment, experiment: Experiment, source: YamlSource, folder: Path | None, workers: int
) -> SpecError | None:
    """Return the first error of the stages of a trial of `experiment`: batches and, if the folder that paths refer
    to is known, their files. None if there is no error."""
    invalid = _first_invalid_stage(trial, experiment, source, folder, workers, set())
    return None if invalid is None else invalid[1]


def _first_invalid_stage(
    trial: Experiment,
    experiment: Experiment,
    source: YamlSource,
    folder: Path | None,
    workers: int,
    checked: set[str],
) -> tuple[str, SpecError] | None:
    """Return the first invalid stage that the metrics depend on, and its error. `checked`: stages already checked."""
    assert experiment.search is not None, "only a search has trials"
    names = {metric.split(".")[0] for metric in experiment.search.metrics}
    for name, stage in with_upstream(trial.stages, names).items():
        key = f"{name} {stage.model_dump_json()}"
        if isinstance(stage, Augment):  # whether it shares rows with evaluation data depends on the datasets
            key += "".join(other.model_dump_json() for other in trial.stages.values() if isinstance(other, Dataset))
        if key in checked:
            continue
        checked.add(key)
        errors = [*validate_batches(name, stage, trial, source, workers)]
        if folder is not None and (stage != experiment.stages[name] or isinstance(stage, Augment)):
            errors += validate_stage(name, stage, trial, source, folder)
        if errors:
            return name, errors[0]
    return None


def validate_warm_start(experiment: Experiment, source: YamlSource, store: Store) -> Iterator[SpecError]:
    for index, name in enumerate(experiment.search.warm_start if experiment.search else ()):
        if name == experiment.name:
            yield error_at(
                source,
                ("search", "warm_start", index),
                f"`{name}` is this run itself: its trials change while it runs",
                remedy="an interrupted search resumes by itself; to start another one from its results, rename it",
            )
        elif not (store.run(name) / "events").is_dir():
            runs = store.root / "runs"
            known = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
            yield error_at(
                source,
                ("search", "warm_start", index),
                f"there is no run `{name}` in {store.root}",
                remedy=nearest(name, known),
            )


def _values(path: str, dimension: Dimension) -> Sequence[Any]:
    """Return all choices or the ends of a range; for a range of batch sizes every value, since each may or may not
    divide evenly."""
    if dimension.enumerated is not None and path.endswith(".global_batch_size"):
        return dimension.enumerated
    return dimension.values


def _error_path(name: str, space: Iterable[str]) -> KeyPath:
    """Return where to report an invalid stage of a trial: its searched batch size, another searched field, or the
    stage."""
    own = [path for path in space if path.split(".")[0] == name]
    own.sort(key=lambda path: not path.endswith(".global_batch_size"))
    return ("search", "space", own[0]) if own else ("stages", name, "global_batch_size")

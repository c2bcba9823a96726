"""Validate an experiment without running it, beyond its text: files, columns, models, batches, store.

Does not start Ray and writes nothing. torch is imported only if config.json of a model is not sufficient
(models/meta_model.py): for a `target_modules` list, or a `max_length` beyond the positions in the config.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunery.errors import RequestError, SpecError, SpecErrors
from tunery.ingest.read import first_rows, source_label, validate_source
from tunery.ingest.sources import BUILTIN, BadSource, sources_of
from tunery.models.model_folder import BadModel, check_model_folder
from tunery.pipeline.cache_keys import model_folder, pretrained_models
from tunery.pipeline.validate_augment import validate_augment
from tunery.pipeline.validate_models import position_notes, validate_models
from tunery.pipeline.validate_templates import validate_templates
from tunery.pipeline.validate_training import known_labels, root_of, validate_rewards, validate_row_formats
from tunery.review.decisions import BadDecisions, decisions_path, read_decisions
from tunery.spec import (
    Augment,
    ClassifierTraining,
    Dataset,
    Dimension,
    Experiment,
    Review,
    ReviewLabels,
    Score,
    ScorerSpec,
    Stage,
    Training,
)
from tunery.spec.error_messages import error_at, nearest
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.spec.scorers import SCORERS
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource
from tunery.store import Store
from tunery.training.auto import global_batch_sizes
from tunery.training.batches import plan_batches

MAX_COMBINATIONS = 10_000
LABEL_SAMPLE_SIZE = 100
"""Number of rows that are searched for a label."""


def validate(experiment: Experiment, source: YamlSource, store: Store, workers: int, trial_workers: int) -> None:
    """Validate an experiment. Raises SpecErrors with file and line, or StoreError."""
    folder = Path(source.file).parent
    errors: list[SpecError] = []
    for name, stage in experiment.stages.items():
        errors += _check_stage(name, stage, experiment, source, folder)
        errors += _check_batches(name, stage, experiment, source, workers)
    if not errors:
        errors += _check_space(experiment, source, folder, trial_workers)
        errors += _check_warm_start(experiment, source, store)
    if errors:
        raise SpecErrors(errors)
    store.check_writable()


def notes(experiment: Experiment, source: YamlSource) -> list[str]:
    """Return notes about a valid experiment."""
    return [*pending_reviews(experiment, source), *position_notes(experiment, Path(source.file).parent)]


def pending_reviews(experiment: Experiment, source: YamlSource) -> list[str]:
    """Return a note for each review without decisions, at which a run will stop."""
    folder = Path(source.file).parent
    return [
        f"`{name}` needs decisions, and there are none in {stage.decisions} yet: `tunery run` builds "
        f"`{stage.data}` and stops there; then run `tunery review {source.file} {name}`"
        for name, stage in experiment.stages.items()
        if isinstance(stage, Review) and not read_decisions(decisions_path(stage, folder))
    ]


def _check_stage(
    name: str, stage: Stage, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    at = ("stages", name)
    if isinstance(stage, Dataset):
        try:
            validate_source(stage, folder)
        except BadSource as error:
            yield error_at(
                source, (*at, error.field), f"{name}: {error.message}", cause=error.cause, remedy=error.remedy
            )
    if isinstance(stage, Review):
        try:
            read_decisions(decisions_path(stage, folder))
        except BadDecisions as error:
            yield error_at(
                source, (*at, "decisions"), f"{name}: {error.message}", cause=error.cause, remedy=error.remedy
            )
    if isinstance(stage, Augment):
        yield from validate_augment(name, stage, experiment, source, folder)
    models_valid = True
    for model in pretrained_models(stage):
        if model.is_folder:
            try:
                check_model_folder(model_folder(model, folder))
            except BadModel as error:
                models_valid = False
                yield error_at(source, at, f"{name}: {error.message}", cause=error.cause, remedy=error.remedy)
    if isinstance(stage, Score) and models_valid:
        for index, scorer in enumerate(stage.by):
            try:
                _check_labels(scorer, experiment, folder)
            except BadModel as error:
                yield error_at(
                    source, (*at, "by", index), f"{name}: {error.message}", cause=error.cause, remedy=error.remedy
                )
    if isinstance(stage, ClassifierTraining):
        yield from _check_has_labels(name, stage, experiment, source, folder)
    yield from validate_row_formats(name, stage, experiment, source, folder)
    if models_valid:
        model_errors = list(validate_models(name, stage, experiment, source, folder))
        yield from model_errors
        yield from validate_rewards(name, stage, experiment, source, folder)
        if not model_errors:
            yield from validate_templates(name, stage, experiment, source, folder)


def _check_labels(scorer: ScorerSpec, experiment: Experiment, folder: Path) -> None:
    """Raise BadModel if a stage or model folder does not have the labels of the scorer: building the scorer checks
    them. Models on the hub are checked when they are loaded."""
    entry, model = SCORERS[scorer.kind()], scorer.model
    if entry.input_kind != "classification" or model is None:
        return
    if (labels := known_labels(model, experiment, folder)) is not None:
        entry.load()(scorer, labels, model if isinstance(model, str) else model.pretrained)


def _check_has_labels(
    name: str, stage: ClassifierTraining, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """Check that the rows of a classifier have labels, from the first rows of the dataset or from a review."""
    for field in ("data", "eval_data"):
        data = getattr(stage, field)
        at = ("stages", name, field)
        if isinstance(data, ReviewLabels) and not isinstance(experiment.stages[data.review], Review):
            yield error_at(
                source,
                (*at, "review"),
                f"`{name}.{field}.review` needs a review, but `{data.review}` is a "
                f"{experiment.stages[data.review].kind} stage",
                cause="labels are read from the decisions of a reviewer",
                remedy=f"for rows with labels, write `{field}: {data.review}`",
            )
        if not isinstance(data, str):
            continue
        root = root_of(experiment, data)
        try:
            rows = [] if BUILTIN in sources_of(root) else first_rows(root, folder, LABEL_SAMPLE_SIZE)
        except BadSource:  # reported for the dataset
            continue
        if all(row.get("label") is None for row in rows):
            checked = f", none of the first {len(rows):,} of {source_label(root)}" if rows else ""
            yield error_at(
                source,
                at,
                f"`{name}.{field}` needs labelled rows, but those of `{data}` have no label{checked}",
                cause="a classifier learns from rows that are known to be good or bad",
                remedy="name the column as `columns: {.., label: COLUMN}` in the dataset; or use two stages, "
                "`{good: STAGE, bad: STAGE}`, or the decisions of a review, `{review: STAGE}`",
            )


def _check_batches(
    name: str, stage: Stage, experiment: Experiment, source: YamlSource, workers: int
) -> Iterator[SpecError]:
    """Check that batches divide evenly. `auto` is rejected only if every possible value fails, since the number of rows
    is not known yet."""
    if isinstance(stage, Training):
        micro = experiment.compute.micro_batch_size
        sizes = global_batch_sizes(stage)
        errors: list[RequestError] = []
        for size in sizes:
            try:
                plan_batches(1, 1, size // stage.num_minibatches, workers, None if micro == "auto" else micro)
            except RequestError as error:
                errors.append(error)
        if len(errors) == len(sizes):
            at = ("stages", name, "global_batch_size")
            yield error_at(source, at, f"{name}: {errors[0].message}", cause=errors[0].cause, remedy=errors[0].remedy)


def _check_space(experiment: Experiment, source: YamlSource, folder: Path, workers: int) -> Iterator[SpecError]:
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
        errors = [*_check_batches(name, stage, trial, source, workers)]
        if folder is not None and (stage != experiment.stages[name] or isinstance(stage, Augment)):
            errors += _check_stage(name, stage, trial, source, folder)
        if errors:
            return name, errors[0]
    return None


def _check_warm_start(experiment: Experiment, source: YamlSource, store: Store) -> Iterator[SpecError]:
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

"""Checks of a single stage before a run: its source, decisions, models, labels, rows and batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tunery.errors import RequestError, SpecError
from tunery.ingest.read import first_rows, source_label, validate_source
from tunery.ingest.sources import BUILTIN, BadSource, sources_of
from tunery.models.model_folder import BadModel, check_model_folder
from tunery.pipeline.cache_keys import model_folder, pretrained_models
from tunery.pipeline.validate_augment import validate_augment
from tunery.pipeline.validate_models import validate_models
from tunery.pipeline.validate_templates import validate_templates
from tunery.pipeline.validate_training import known_labels, validate_rewards, validate_row_formats
from tunery.review.decisions import BadDecisions, decisions_path, read_decisions
from tunery.spec import (
    Augment,
    ClassifierTraining,
    Dataset,
    Experiment,
    Review,
    ReviewLabels,
    Score,
    ScorerSpec,
    Stage,
    Training,
)
from tunery.spec.error_messages import error_at
from tunery.spec.graph import root_dataset
from tunery.spec.scorers import SCORERS
from tunery.spec.yaml_source import YamlSource
from tunery.training.auto import global_batch_sizes
from tunery.training.batches import plan_batches

LABEL_SAMPLE_SIZE = 100
"""Number of rows that are searched for a label."""


def validate_stage(
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
        root = root_dataset(experiment.stages, data)
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


def validate_batches(
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

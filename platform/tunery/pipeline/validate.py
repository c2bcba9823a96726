"""What can be checked of an experiment without running it, beyond its text: files, columns, models, batches, store.

Nothing here starts Ray or writes. torch is imported only where an experiment asks what a model's config.json does not
answer by itself (models/meta_model.py): a `target_modules` list, or a `max_length` beyond the positions that it names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunery.errors import RequestError, SpecError, SpecErrors
from tunery.ingest.read import check_source, first_rows, source_label
from tunery.ingest.sources import BUILTIN, BadSource, sources_of
from tunery.models.model_folder import BadModel, check_model_folder
from tunery.pipeline.cache_keys import model_folder, pretrained_models
from tunery.pipeline.validate_augment import validate_augment
from tunery.pipeline.validate_models import long_notes, validate_models
from tunery.pipeline.validate_templates import validate_templates
from tunery.pipeline.validate_training import check_shapes, known_labels, root_of, validate_rewards
from tunery.review.decisions import BadDecisions, decisions_path, read_decisions
from tunery.spec import (
    AUTO,
    Augment,
    ClassificationSpec,
    Classifier,
    ClassifierTraining,
    Dataset,
    Dimension,
    Experiment,
    Ppo,
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
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource
from tunery.store import Store
from tunery.training.auto import global_batch_sizes
from tunery.training.batches import plan_batches

MOST_COMBINATIONS = 10_000
LOOKED_AT = 100
"""Rows, for a label."""


def validate(experiment: Experiment, source: YamlSource, store: Store, workers: int, trial_workers: int) -> None:
    """Raises SpecErrors with file and line, or StoreError."""
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
    """What somebody should know of an experiment in which nothing is wrong."""
    return [*waiting(experiment, source), *long_notes(experiment, Path(source.file).parent)]


def waiting(experiment: Experiment, source: YamlSource) -> list[str]:
    """What a run will stop for: nothing is wrong with it, but somebody has to do something first."""
    folder = Path(source.file).parent
    return [
        f"`{name}` waits for decisions, there are none in {stage.decisions} yet: `tunery run` makes `{stage.data}` "
        f"and stops there; then `tunery review {source.file} {name}`"
        for name, stage in experiment.stages.items()
        if isinstance(stage, Review) and not read_decisions(decisions_path(stage, folder))
    ]


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
    if isinstance(stage, Review):
        try:
            read_decisions(decisions_path(stage, folder))
        except BadDecisions as error:
            yield error_at(
                source, (*at, "decisions"), f"{name}: {error.message}", cause=error.cause, remedy=error.remedy
            )
    if isinstance(stage, Augment):
        yield from validate_augment(name, stage, experiment, source, folder)
    whole = True
    for model in pretrained_models(stage):
        if model.is_folder:
            try:
                check_model_folder(model_folder(model, folder))
            except BadModel as error:
                whole = False
                yield error_at(source, at, f"{name}: {error.message}", cause=error.cause, remedy=error.remedy)
    if isinstance(stage, Score) and whole:
        for index, scorer in enumerate(stage.by):
            try:
                _check_labels(scorer, experiment, folder)
            except BadModel as error:
                yield error_at(
                    source, (*at, "by", index), f"{name}: {error.message}", cause=error.cause, remedy=error.remedy
                )
    if isinstance(stage, ClassifierTraining):
        yield from _check_has_labels(name, stage, experiment, source, folder)
    yield from check_shapes(name, stage, experiment, source, folder)
    if whole:
        of_models = list(validate_models(name, stage, experiment, source, folder))
        yield from of_models
        yield from validate_rewards(name, stage, experiment, source, folder)
        if not of_models:
            yield from validate_templates(name, stage, experiment, source, folder)


def _check_labels(scorer: ScorerSpec, experiment: Experiment, folder: Path) -> None:
    """Raises BadModel where a stage or a model folder can't give the scorer's labels; one on the hub is looked at when
    it is loaded."""
    model = scorer.model
    if not isinstance(scorer, ClassificationSpec) or model is None:
        return
    name = model if isinstance(model, str) else model.pretrained
    if (labels := known_labels(model, experiment, folder)) is None:
        return
    if isinstance(scorer, Classifier):
        labels.index(scorer.label, name)
        if scorer.temperature == AUTO:
            labels.fitted_temperature(name)
    else:
        labels.check_single(name)


def _check_has_labels(
    name: str, stage: ClassifierTraining, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """Where labels come from: the rows themselves, by the first of them, or a review."""
    for field in ("data", "eval_data"):
        data = getattr(stage, field)
        at = ("stages", name, field)
        if isinstance(data, ReviewLabels) and not isinstance(experiment.stages[data.review], Review):
            yield error_at(
                source,
                (*at, "review"),
                f"`{name}.{field}.review` needs a review, but `{data.review}` is a "
                f"{experiment.stages[data.review].kind} stage",
                cause="labels are read from what a person decided",
                remedy=f"for rows that bear labels, write `{field}: {data.review}`",
            )
        if not isinstance(data, str):
            continue
        root = root_of(experiment, data)
        try:
            rows = [] if BUILTIN in sources_of(root) else first_rows(root, folder, LOOKED_AT)
        except BadSource:  # told at the dataset
            continue
        if all(row.get("label") is None for row in rows):
            looked = f", of {source_label(root)} not one of the first {len(rows):,}" if rows else ""
            yield error_at(
                source,
                at,
                f"`{name}.{field}` needs labelled rows, but those of `{data}` bear no label{looked}",
                cause="a classifier learns from rows that are known to be good or bad",
                remedy="name the column as `columns: {.., label: COLUMN}` in the dataset; or take two stages, "
                "`{good: STAGE, bad: STAGE}`, or a review's decisions, `{review: STAGE}`",
            )


def _check_batches(
    name: str, stage: Stage, experiment: Experiment, source: YamlSource, workers: int
) -> Iterator[SpecError]:
    """`auto` is only refused when nothing that it can become would do: the rows are not counted yet."""
    if isinstance(stage, Training):
        micro = experiment.compute.micro_batch_size
        sizes = global_batch_sizes(stage)
        errors: list[RequestError] = []
        for size in sizes:
            try:
                share = size // stage.minibatches if isinstance(stage, Ppo) else size
                plan_batches(1, 1, share, workers, None if micro == "auto" else micro)
            except RequestError as error:
                errors.append(error)
        if len(errors) == len(sizes):
            at = ("stages", name, "global_batch_size")
            yield error_at(source, at, f"{name}: {errors[0].message}", cause=errors[0].cause, remedy=errors[0].remedy)


def _check_space(experiment: Experiment, source: YamlSource, folder: Path, workers: int) -> Iterator[SpecError]:
    """Every combination of listed values (and ends of ranges) must be an experiment whose files are there and whose
    batches can be shared out over a trial's workers. Told is the first that is not."""
    if experiment.search is None:
        return
    space = experiment.search.space
    seen: set[str] = set()
    values = [_values(path, dimension) for path, dimension in space.items()]
    for combination in itertools.islice(itertools.product(*values), MOST_COMBINATIONS):
        drawn = dict(zip(space, combination, strict=True))
        overrides: dict[str, Any] = {path: value for path, value in drawn.items() if space[path].is_active(drawn)}
        try:
            trial = with_overrides(experiment, overrides)
        except ValueError as error:
            cause = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            remedy = "" if isinstance(error, ValidationError) else "let the one depend on the other by `when`"
            message = f"no trial can have {overrides} together"
            yield error_at(source, ("search", "space"), message, cause=cause, remedy=remedy)
            return
        found = _check_made(trial, experiment, source, folder, workers, seen)
        if found is not None:
            name, wrong = found
            searched = {path: value for path, value in overrides.items() if path.split(".")[0] == name}
            with_values = f"with {searched} " if searched else ""
            message = f"a trial {with_values}can't work: {wrong.message}"
            yield error_at(source, _blamed(name, space), message, cause=wrong.cause, remedy=wrong.remedy)
            return


def check_trial(
    trial: Experiment, experiment: Experiment, source: YamlSource, folder: Path | None, workers: int
) -> SpecError | None:
    """What is wrong with the stages that a trial of `experiment` makes: their batches and, where the folder that paths
    start from is known, their files. None when nothing is."""
    found = _check_made(trial, experiment, source, folder, workers, set())
    return None if found is None else found[1]


def _check_made(
    trial: Experiment,
    experiment: Experiment,
    source: YamlSource,
    folder: Path | None,
    workers: int,
    seen: set[str],
) -> tuple[str, SpecError] | None:
    """The first stage that is wrong, of those that the metrics need, and why. `seen`: stages that were looked at."""
    assert experiment.search is not None, "only a search has trials"
    wanted = {metric.split(".")[0] for metric in experiment.search.metrics}
    for name, stage in with_upstream(trial.stages, wanted).items():
        key = f"{name} {stage.model_dump_json()}"
        if isinstance(stage, Augment):  # whether it shares rows with what is measured on lies in the datasets too
            key += "".join(other.model_dump_json() for other in trial.stages.values() if isinstance(other, Dataset))
        if key in seen:
            continue
        seen.add(key)
        wrong = [*_check_batches(name, stage, trial, source, workers)]
        if folder is not None and (stage != experiment.stages[name] or isinstance(stage, Augment)):
            wrong += _check_stage(name, stage, trial, source, folder)
        if wrong:
            return name, wrong[0]
    return None


def _check_warm_start(experiment: Experiment, source: YamlSource, store: Store) -> Iterator[SpecError]:
    for index, name in enumerate(experiment.search.warm_start if experiment.search else ()):
        if name == experiment.name:
            yield error_at(
                source,
                ("search", "warm_start", index),
                f"`{name}` is this run itself: its trials change while it runs",
                remedy="a search that was cut off goes on by itself; to begin another with what it found, rename it",
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
    """All choices and the ends of ranges; of a range of batch sizes every one, for they fit or not one by one."""
    if dimension.enumerated is not None and path.endswith(".global_batch_size"):
        return dimension.enumerated
    return dimension.values


def _blamed(name: str, space: Iterable[str]) -> KeyPath:
    """Where a trial's bad stage comes from: the searched batch size, another searched field of it, or the stage."""
    own = [path for path in space if path.split(".")[0] == name]
    own.sort(key=lambda path: not path.endswith(".global_batch_size"))
    return ("search", "space", own[0]) if own else ("stages", name, "global_batch_size")

"""Validate a search from the experiment file alone: its metrics are logged, its dimensions refer to fields that accept
their values, and its scheduler, algorithm, conditions and initial points are consistent with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from tunery.errors import SpecError
from tunery.spec import graph
from tunery.spec.check_references import check_references, check_scores
from tunery.spec.error_messages import error_at, nearest, sentence
from tunery.spec.experiment import Experiment
from tunery.spec.overrides import PathError, with_overrides
from tunery.spec.references import AUTO
from tunery.spec.search import Dimension, Search, as_tuple
from tunery.spec.stage_kinds import STAGE_KINDS
from tunery.spec.trainings import OVERRIDABLE, Training
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource


def metrics_of(experiment: Experiment) -> list[str]:
    """Return every metric that a search can optimize or constrain."""
    return [
        f"{name}.{path}"
        for name, stage in experiment.stages.items()
        for path in stage.metric_paths(STAGE_KINDS[stage.kind].metrics)
    ]


def check_search(experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    """Yield the errors of the search of an experiment, if it has one."""
    search = experiment.search
    if search is None:
        return
    if errors := [*_check_metrics(experiment, search, source)]:
        yield from errors
        return
    if search.algorithm == "grid":
        yield from _check_grid(search, source)
    reached = graph.with_upstream(experiment.stages, [metric.split(".")[0] for metric in search.metrics])
    for path, dimension in search.space.items():
        at: KeyPath = ("search", "space", path)
        if errors := [*_check_conditions(path, dimension, search, source)]:
            yield from errors
            continue
        if error := _check_values(path, dimension, experiment, source):
            yield error
        elif path.split(".")[0] not in reached:
            yield error_at(
                source,
                at,
                f"`{path}` can't change `{search.metric}`",
                cause=f"`{search.metric.split('.')[0]}` does not depend on `{path.split('.')[0]}`",
                remedy=f"search fields of: {', '.join(reached)}",
            )
    for index, point in enumerate(search.initial_points):
        yield from _check_point(point, ("search", "initial_points", index), search, source)


def _check_metrics(experiment: Experiment, search: Search, source: YamlSource) -> Iterator[SpecError]:
    known = metrics_of(experiment)
    named: list[tuple[KeyPath, str]] = [(("search", "metric"), search.metric)]
    for field in ("objectives", "constraints"):
        items = getattr(search, field)
        named += [(("search", field, index, "metric"), item.metric) for index, item in enumerate(items)]
    for path, metric in named:
        if metric not in known:
            cause = "" if known else "no stage logs a metric: set `eval_data` of a training, or add an evaluate stage"
            yield error_at(source, path, f"no stage logs `{metric}`", cause=cause, remedy=nearest(metric, known))
    if search.scheduler != "none" and search.metric in known:
        yield from _check_scheduler(experiment, search, source, known)


def _check_scheduler(
    experiment: Experiment, search: Search, source: YamlSource, known: list[str]
) -> Iterator[SpecError]:
    at: KeyPath = ("search", "scheduler")
    logged_during_training = [name for name in known if name.count(".") == 1]
    name = search.metric.split(".")[0]
    stage = experiment.stages[name]
    if search.metric not in logged_during_training or not isinstance(stage, Training):
        yield error_at(
            source,
            at,
            f"{search.scheduler} can't stop trials early by `{search.metric}`",
            cause="that metric is computed once, after the training",
            remedy=f"use one of: {', '.join(logged_during_training)}"
            if logged_during_training
            else "use `scheduler: none`, or set `eval_data` of a training and use its eval_loss",
        )
    elif stage.num_evals == 1 and f"{name}.num_evals" not in search.space:
        yield error_at(
            source,
            at,
            f"{search.scheduler} can't stop trials early by `{search.metric}`",
            cause=f"`{name}` evaluates once, at its end (`num_evals: 1`)",
            remedy="increase `num_evals`, or use `scheduler: none`",
        )
    elif search.scheduler == "pbt":
        yield from _check_population(name, stage, search, source)


def _check_population(name: str, stage: Training[Any], search: Search, source: YamlSource) -> Iterator[SpecError]:
    paths = [f"{name}.{field}" for field in OVERRIDABLE]
    if not any(path in search.space for path in paths):
        yield error_at(
            source,
            ("search", "scheduler"),
            "pbt has no dimension that it can change during training",
            cause=f"the space is: {', '.join(search.space)}",
            remedy=f"search {' or '.join(f'`{path}`' for path in paths)}",
        )
    for path in paths:
        dimension = search.space.get(path)
        if dimension is not None and (dimension.when or AUTO in (dimension.enumerated or ())):
            yield error_at(
                source,
                ("search", "space", path),
                f"pbt can't change `{path}`",
                cause="it is not active in all trials" if dimension.when else "`auto` is not a number",
                remedy="use numbers, without `when`",
            )
    unsupported = [path for path in search.space if path in (f"{name}.schedule_overrides", f"{name}.num_evals")]
    for path in unsupported:
        yield error_at(
            source,
            ("search", "space", path),
            f"pbt can't search `{path}`",
            cause="it sets `schedule_overrides` itself, at evaluations that all trials share",
            remedy="remove it, or use another scheduler",
        )
    if stage.schedule_overrides:
        yield error_at(
            source,
            ("stages", name, "schedule_overrides"),
            f"pbt sets the `schedule_overrides` of `{name}` itself",
            remedy="remove them, or use another scheduler",
        )
    if search.trials == 1:
        yield error_at(
            source, ("search", "trials"), "a population of 1 has no other trial to copy", remedy="increase it"
        )


def _check_conditions(path: str, dimension: Dimension, search: Search, source: YamlSource) -> Iterator[SpecError]:
    for other, values in dimension.when.items():
        at: KeyPath = ("search", "space", path, "when", other)
        condition = search.space.get(other)
        if condition is None:
            others = [name for name in search.space if name != path]
            yield error_at(
                source,
                at,
                f"`{path}` depends on `{other}`, which is not a dimension",
                remedy=nearest(other, others),
            )
            continue
        for value in as_tuple(values):
            if not condition.contains(value):
                yield error_at(
                    source,
                    at,
                    f"`{path}` requires `{other}` to be {value!r}, which is not in its dimension",
                    cause=f"`{other}` is {condition.describe()}",
                    remedy="use one of its values",
                )
    if not dimension.when or any(other not in search.space for other in dimension.when):
        return
    seen, queue = {path}, list(dimension.when)
    while queue:
        other = queue.pop()
        if other == path:
            yield error_at(
                source,
                ("search", "space", path, "when"),
                f"the condition of `{path}` depends on itself",
                cause=f"its conditions form a cycle: {' -> '.join([*seen, path])}",
                remedy="remove the condition of one of them",
            )
            return
        if other not in seen and other in search.space:
            seen.add(other)
            queue += search.space[other].when


def _check_values(path: str, dimension: Dimension, experiment: Experiment, source: YamlSource) -> SpecError | None:
    """Return an error unless each value (or end of a range) gives a valid experiment when the dimension is active."""
    assert experiment.search is not None, "the caller has a dimension"
    at: KeyPath = ("search", "space", path)
    for value in dimension.values:
        try:
            trial = with_overrides(experiment, {**conditions_met(path, experiment.search.space), path: value})
        except PathError as error:
            return error_at(source, at, f"invalid search path {error}", remedy=error.remedy)
        except ValidationError as error:
            return error_at(
                source,
                at,
                f"`{path}` can't be {value!r}",
                cause=sentence(error.errors()[0]),
                remedy="change the dimension so that every value fits the field",
            )
        if errors := list(check_references(trial, source)) or list(check_scores(trial, source)):
            return error_at(
                source, at, f"`{path}` can't be {value!r}", cause=errors[0].message, remedy=errors[0].remedy
            )
    return None


def conditions_met(path: str, space: Mapping[str, Dimension]) -> dict[str, Any]:
    """Return values of other dimensions that make this dimension active: the first value of each condition."""
    met: dict[str, Any] = {}
    for other, values in space[path].when.items():
        met |= {**conditions_met(other, space), other: as_tuple(values)[0]}
    return met


def _check_point(point: dict[str, Any], at: KeyPath, search: Search, source: YamlSource) -> Iterator[SpecError]:
    for path, value in point.items():
        dimension = search.space.get(path)
        if dimension is None:
            yield error_at(
                source,
                (*at, path),
                f"`{path}` of an initial point is not a dimension",
                remedy=nearest(path, search.space),
            )
        elif not dimension.contains(value):
            yield error_at(
                source,
                (*at, path),
                f"`{path}` of an initial point can't be {value!r}",
                cause=f"`{path}` is {dimension.describe()}",
                remedy="use a value of the space, or extend the space",
            )
        elif not dimension.is_active(point):
            yield error_at(
                source,
                (*at, path),
                f"`{path}` of an initial point is not active",
                cause=f"it is {dimension.describe()}",
                remedy="add the values of its condition, or remove it",
            )


def _check_grid(search: Search, source: YamlSource) -> Iterable[SpecError]:
    combinations = [
        len(dimension.enumerated) for dimension in search.space.values() if dimension.enumerated is not None
    ]
    for path, dimension in search.space.items():
        if dimension.enumerated is None:
            yield error_at(
                source,
                ("search", "space", path),
                f"a grid needs a list of values, but `{path}` is {dimension.describe()}",
                remedy="list the values as `choice`, set `step`, or use `algorithm: random`",
            )
    count = math.prod(combinations)
    if len(combinations) == len(search.space) and count > search.trials and not _conditional(search):
        yield error_at(
            source,
            ("search", "trials"),
            f"the grid has {count} combinations, but `trials` is {search.trials}",
            remedy=f"set `trials: {count}`, or use `algorithm: random`",
        )


def _conditional(search: Search) -> bool:
    """Whether some dimension has a condition. The grid then has fewer distinct combinations, which are counted in
    search/space.py."""
    return any(dimension.when for dimension in search.space.values())

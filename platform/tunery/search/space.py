"""From the experiment's search to Tune's parameter space, and from a trial's values to the trial's experiment. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tunery.spec import Dimension, Evaluate, Experiment, Search, Training, WinRate
from tunery.spec.graph import closure
from tunery.spec.overrides import with_overrides
from tunery.spec.reference import model_name

if TYPE_CHECKING:
    from ray.tune.search.sample import Domain


def parameter_space(search: Search) -> dict[str, Any]:
    """Tune's space by path; for a grid every value of every dimension."""
    from ray import tune

    if search.algorithm == "grid":
        return {path: tune.grid_search(list(dimension.values)) for path, dimension in search.space.items()}
    return {path: _domain(dimension) for path, dimension in search.space.items()}


def _domain(dimension: Dimension) -> Domain:
    from ray import tune

    if dimension.choice is not None:
        return tune.choice(list(dimension.choice))
    if dimension.uniform is not None:
        return tune.uniform(*dimension.uniform)
    if dimension.loguniform is not None:
        return tune.loguniform(*dimension.loguniform)
    assert dimension.randint is not None, "a dimension has exactly one kind"
    return tune.randint(*dimension.randint)


def trial_id(overrides: Mapping[str, Any]) -> str:
    """The same values, the same name: a resumed search goes on in the same W&B runs."""
    return "trial-" + hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:6]


def metric_stage(metric: str) -> str:
    return metric.split(".")[0]


def trial_experiment(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """The experiment with other values, cut down to what the search's metric needs.

    Of an evaluate stage that is one model on one set (and the baseline, where it is about forgetting), of a win_rate
    stage one model, so that trials do not measure other models again and again.
    """
    assert experiment.search is not None, "only a search has trials"
    trial = with_overrides(experiment, overrides)
    name, *rest = experiment.search.metric.split(".")
    stage = trial.stages[name]
    stages = dict(trial.stages)
    if isinstance(stage, Evaluate):
        model, data, metric = rest
        baseline = stage.baseline if metric == "forgetting" else None
        models = tuple(item for item in stage.models if model_name(item) == model or item == baseline)
        stages[name] = stage.model_copy(
            update={"models": models, "data": {data: stage.data[data]}, "baseline": baseline}
        )
    if isinstance(stage, WinRate):
        models = tuple(item for item in stage.models if model_name(item) == rest[0])
        stages[name] = stage.model_copy(update={"models": models})
    return trial.model_copy(
        update={
            "stages": closure(stages, [name]),
            "search": None,
            "compute": trial.compute.model_copy(update={"workers": trial.compute.workers_per_trial}),
        }
    )


def metric_of(facts: Mapping[str, Any], metric: str) -> float:
    """The metric's value in the facts of its stage's artifact."""
    _, *rest = metric.split(".")
    if len(rest) == 1:
        return float(facts[rest[0]])
    model, data, name = rest
    return next(float(result[name]) for result in facts["results"] if (result["model"], result["set"]) == (model, data))


def curve_stage(experiment: Experiment) -> str | None:
    """The training whose evaluations a trial reports while it runs: the one that the metric names."""
    assert experiment.search is not None, "only a search has a metric"
    name = metric_stage(experiment.search.metric)
    return name if isinstance(experiment.stages[name], Training) else None


def most_rows(experiment: Experiment, rows: int) -> int:
    """Upper bound of the rows that any trial sees: all rows, at the most epochs of the space."""
    assert experiment.search is not None, "only a search has a space"
    name = curve_stage(experiment)
    stage = experiment.stages[name or ""]
    assert isinstance(stage, Training), "asha was checked to follow a training"
    dimension = experiment.search.space.get(f"{name}.epochs")
    epochs = [value for value in dimension.values if value != "auto"] if dimension else [stage.epochs]
    return max(1, round(rows * max((float(value) for value in epochs if value != "auto"), default=4.0)))

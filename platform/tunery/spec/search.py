"""Config of a search. Any field of any stage can be a dimension, by its path (`sft.learning_rate`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from tunery.spec.references import Config

Mode = Literal["min", "max"]
Pair = tuple[float, float]
KINDS = ("choice", "grid", "uniform", "loguniform", "int")


class Dimension(Config):
    """Values of one key: exactly one of `choice`, `grid`, `uniform`, `loguniform` and `int`. Ranges include both ends;
    values outside the bounds of the key are rejected."""

    model_config = ConfigDict(serialize_by_alias=True)

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of these values."""
    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Values that trials use in turn, with any algorithm, so that each gets as many trials (with several grids each
    combination)."""
    uniform: Pair | None = None
    """Uniform in [LOW, HIGH]."""
    loguniform: Pair | None = None
    """Uniform in the logarithm: 1e-5 to 1e-4 is as likely as 1e-4 to 1e-3."""
    integer: Annotated[tuple[int, int] | None, Field(alias="int")] = None
    """Integers in [LOW, HIGH]."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Step of a `uniform` or `int`, from its lower end."""
    when: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Condition: other dimensions by path, and the value (or list of values) that each must have for this one to be
    active. Otherwise the key has the file's value."""

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        given = [name for name in KINDS if self._of(name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of {', '.join(f'`{name}`' for name in KINDS)}")
        bounds = self.bounds
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"the range {list(bounds)} is empty: the lower bound comes first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform starts at {self.loguniform[0]:g}, but must start above 0")
        if self.step is not None:
            if bounds is None or self.loguniform:
                raise ValueError(f"`step` is for `uniform` and `int`, not for `{given[0]}`")
            if self.step > bounds[1] - bounds[0]:
                raise ValueError(f"a step of {self.step:g} is larger than the range {list(bounds)}")
            if self.integer and self.step != round(self.step):
                raise ValueError(f"a step of {self.step:g} is not an integer")
        return self

    def _of(self, kind: str) -> Any:
        return getattr(self, "integer" if kind == "int" else kind)

    @property
    def bounds(self) -> Pair | None:
        """Bounds of a range, both included."""
        return self.uniform or self.loguniform or self.integer

    @property
    def enumerated(self) -> Sequence[Any] | None:
        """All values, if they are listed or the range has a step; None for a continuous range."""
        if self.choice is not None or self.grid is not None:
            return self.choice or self.grid
        if self.integer is not None:
            return range(self.integer[0], self.integer[1] + 1, round(self.step or 1))
        if self.uniform is not None and self.step is not None:
            count = math.floor((self.uniform[1] - self.uniform[0]) / self.step + 1e-9)
            return tuple(round(self.uniform[0] + index * self.step, 12) for index in range(count + 1))
        return None

    @property
    def values(self) -> tuple[Any, ...]:
        """The values to validate before the first trial: all choices, or the ends of a range."""
        if self.choice is not None or self.grid is not None:
            return self.choice or self.grid or ()
        assert self.bounds is not None, "a dimension has exactly one kind"
        return (self.enumerated[0], self.enumerated[-1]) if self.enumerated else self.bounds

    def contains(self, value: Any) -> bool:
        """Whether the value is in the dimension."""
        if isinstance(self.enumerated, range):  # `in` is fast for integers only
            is_integer = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            return is_integer and int(value) in self.enumerated
        if self.enumerated is not None:
            return value in self.enumerated
        assert self.bounds is not None, "a dimension has exactly one kind"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.bounds[0] <= value <= self.bounds[1]

    def is_active(self, others: Mapping[str, Any]) -> bool:
        """Whether the conditions (`when`) are met by these values of other dimensions."""
        return all(path in others and others[path] in as_tuple(values) for path, values in self.when.items())

    def describe(self) -> str:
        kind = next(name for name in KINDS if self._of(name) is not None)
        text = f"{kind} {list(self._of(kind))}" + (f" step {self.step:g}" if self.step else "")
        conditions = [f"{path} is {' or '.join(map(str, as_tuple(values)))}" for path, values in self.when.items()]
        return text + (f" when {' and '.join(conditions)}" if conditions else "")


def as_tuple(values: Any) -> tuple[Any, ...]:
    """Return the values of a condition, which is a single value or a list."""
    return tuple(values) if isinstance(values, list | tuple) else (values,)


class Objective(Config):
    """A further metric of the search."""

    metric: str
    """As `metric` of the search."""
    mode: Mode
    """Whether less (min) or more (max) is better."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Weight in a sum with the first metric, whose weight is 1; a metric with the opposite `mode` is subtracted.
    Without weights the result is a Pareto front."""


class Constraint(Config):
    """A bound that a winner must satisfy: `{metric: eval.sft.general.forgetting, max: 0.02}`."""

    metric: str
    """As `metric` of the search."""
    max: float | None = None
    """Upper bound."""
    min: float | None = None
    """Lower bound."""

    @model_validator(mode="after")
    def _bounded(self) -> Constraint:
        if self.max is None and self.min is None:
            raise ValueError("set `max`, `min` or both")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"`min` {self.min:g} is above `max` {self.max:g}")
        return self

    def violation(self, value: float) -> float:
        """Return by how much the value violates the constraint; 0 or less if it is satisfied."""
        over = -math.inf if self.max is None else value - self.max
        under = -math.inf if self.min is None else self.min - value
        return math.inf if math.isnan(value) else max(over, under)


class Budget(Config):
    """Ends the search, whichever comes first; running trials are stopped, and the best so far wins."""

    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of wall time, over all invocations of the command."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """GPU hours: wall time times the GPUs of the search (without GPUs: its CPUs)."""
    target: float | None = None
    """Value of the metric at which the search ends."""


class Search(Config):
    """Runs trials of the experiment with other values. Trials share stages that are equal."""

    metric: str
    """Metric to optimise: `<training stage>.eval_loss` or another metric of its kind (`.eval_accuracy`, `.eval_auc`,
    `.eval_margin`, `.eval_reward`, `.eval_kl`); `<evaluate stage>.<model>.<set>.loss` (or `.perplexity`,
    `.forgetting`); or `<win_rate stage>.<model>.<data stage>.win_rate` (or `.reward`)."""
    mode: Mode
    """Whether less (min) or more (max) is better."""
    objectives: tuple[Objective, ...] = ()
    """Further metrics, all with a weight or all without."""
    constraints: tuple[Constraint, ...] = ()
    """Bounds that a winner must satisfy."""
    trials: Annotated[int, Field(ge=1)]
    """Number of trials."""
    algorithm: Literal["random", "grid", "tpe", "nsga2"] = "random"
    """random: independent samples. grid: every combination once (listed values only), at most `trials`. tpe: random
    trials first (a quarter of `trials`, rounded down, at least 1 and at most 10), then a tree-structured Parzen
    estimator (Bergstra et al. 2011; with several metrics Ozaki et al. 2020). nsga2: a genetic algorithm on the Pareto
    front (Deb et al. 2002). tpe and nsga2 are Optuna's."""
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    """Stops worse trials early by the first metric. asha: trials outside the best third at each rung (Li et al. 2018,
    https://arxiv.org/abs/1810.05934). hyperband: the same, but a rung waits for all trials of its bracket (Li et al.
    2016, https://arxiv.org/abs/1603.06560). median: trials worse than the median of the others' running means (Golovin
    et al. 2017, Vizier). pbt: replaces the worst quarter at each evaluation by copies of the best quarter with another
    learning rate or weight decay (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846)."""
    progress_unit: Literal["tokens", "steps"] = "tokens"
    """Unit of a trial's progress: trained tokens, which compare between batch sizes, or optimizer steps. pbt compares
    at the same evaluation."""
    budget: Budget = Budget()
    """Limits of the whole search."""
    initial_points: tuple[dict[str, Any], ...] = ()
    """Initial points; omitted values are sampled (of a grid: those of the first combination that agrees)."""
    warm_start: tuple[str, ...] = ()
    """Earlier runs in this store: tpe and nsga2 start with the results of their trials, for dimensions that both
    search."""
    num_seeds: Annotated[int, Field(ge=1)] = 1
    """Number of seeds with which the best trials are run before the winner is selected."""
    replicate_top_k: Annotated[int, Field(ge=1)] = 3
    """Number of trials that `num_seeds` repeats."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Dimensions by path, for example `sft.learning_rate`."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of a trial without duplicates; the primary one is first."""
        others = (*(item.metric for item in self.objectives), *(item.metric for item in self.constraints))
        return tuple(dict.fromkeys((self.metric, *others)))

    @property
    def value_name(self) -> str:
        """Name of the value that trials are ranked by."""
        return "weighted sum" if any(item.weight is not None for item in self.objectives) else self.metric

    def describe(self) -> dict[str, Any]:
        """Return the fields of the event `search_started` (events/event_log.py)."""
        return {
            "metric": self.metric,
            "mode": self.mode,
            "metrics": list(self.metrics),
            "objectives": [item.model_dump() for item in self.objectives],
            "constraints": [item.model_dump() for item in self.constraints],
            "trials": self.trials,
            "scheduler": self.scheduler,
            "space": {path: dimension.describe() for path, dimension in self.space.items()},
        }

    @model_validator(mode="after")
    def _weights(self) -> Search:
        weighted = [item.weight is not None for item in self.objectives]
        if any(weighted) and not all(weighted):
            raise ValueError("some `objectives` have a weight and others do not: set it for all or none")
        return self

"""State of a run: its stages, trials and search, and values derived from them.

Built by `tunery.events.event_reducer` from the event log; read by the terminal view and the report.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Literal

from tunery.events.ranking import RankKey, objectives, rank_key
from tunery.spec.overrides import final_values

Status = Literal["pending", "running", "done", "reused", "failed"]
TrialStatus = Literal["pending", "running", "done", "stopped", "failed"]
RunStatus = Literal["pending", "running", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class Point:
    """A point of the training curves: the values of loss, eval_loss, rows and so on at `step`."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """The error that a stage raised."""

    stage: str
    message: str
    cause: str = ""
    remedy: str = ""
    log: str = ""
    trial: str = ""


MIN_TRIALS = 2
"""Minimum number of ended trials for an estimate of the remaining time of a search."""


@dataclass
class StageState:
    """A stage of the run, or of a trial if `trial` is set."""

    name: str
    kind: str = ""
    trial: str = ""
    inputs: list[str] = field(default_factory=list)
    status: Status = "pending"
    detail: str = ""
    fingerprint: str = ""
    artifact: str = ""
    started: float | None = None
    finished: float | None = None
    seconds: float | None = None
    done: float = 0
    total: float = 0
    """0 if unknown."""
    unit: str = ""
    rate: float | None = None
    """Units per second over the last `RATE_WINDOW_SECONDS` (event_reducer.py)."""
    eta_seconds: float | None = None
    """Estimate at the last progress event; None until it is reliable (event_reducer.py). `time_left` counts down from
    it."""
    first_progress: tuple[float, float] | None = None
    """(time, done) of the first event with progress. The time before it is start-up and does not count for `rate`."""
    advances: int = 0
    """Number of progress events since `first_progress`."""
    facts: dict[str, Any] = field(default_factory=dict)
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    preview: dict[str, Any] = field(default_factory=dict)
    """Of a training: its first rows as token sequences (models/preview.py)."""
    error: Failure | None = None
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    """(time, done) of the progress events that `rate` is computed from."""

    @property
    def curve(self) -> list[Point]:
        return [Point(step, self.points[step]) for step in sorted(self.points)]

    def elapsed(self, now: float) -> float | None:
        """Return the elapsed seconds, in total if the stage has ended."""
        if self.seconds is not None:
            return self.seconds
        if self.started is None or self.status == "pending":
            return None
        return max(0.0, (self.finished or now) - self.started)

    def time_left(self, now: float) -> float | None:
        if self.status != "running" or self.eta_seconds is None or not self.recent:
            return None
        return max(0.0, self.eta_seconds - (now - self.recent[-1][0]))

    def reset(self) -> None:
        """Reset to pending for a new invocation. The curve, the preview and their fingerprint are kept."""
        fresh = StageState(self.name, self.kind, self.trial, self.inputs)
        fresh.fingerprint, fresh.points, fresh.preview = self.fingerprint, self.points, self.preview
        self.__dict__.update(fresh.__dict__)


@dataclass
class TrialState:
    """A trial of the search. `points` are intermediate values of the metric that belong to no stage."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    """initial, sampled, added, cloned, pbt_child or replicate."""
    of: str = ""
    """The trial that it is a clone, a copy (PBT) or a replicate of."""
    status: TrialStatus = "pending"
    value: float | None = None
    """The metric or the weighted sum."""
    values: dict[str, float] = field(default_factory=dict)
    """By metric."""
    feasible: bool = True
    """Whether it satisfies the constraints; True if unknown."""
    steps: float | None = None
    tokens: float | None = None
    started: float | None = None
    seconds: float | None = None
    error: str = ""
    stages: dict[str, StageState] = field(default_factory=dict)
    points: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def final_values(self) -> dict[str, Any]:
        """The values at the end of the trial; a copy (PBT) changes its values while it trains."""
        return final_values(self.overrides)

    @property
    def current(self) -> StageState | None:
        """The running stage, or the last one that has started."""
        begun = [stage for stage in self.stages.values() if stage.status != "pending"]
        running = [stage for stage in begun if stage.status == "running"]
        return running[-1] if running else begun[-1] if begun else None


@dataclass(frozen=True)
class ObjectiveState:
    """A further metric of a search; without a `weight` it is an objective of its own (Pareto front)."""

    metric: str
    mode: str = "min"
    weight: float | None = None


@dataclass(frozen=True)
class ConstraintState:
    """A constraint of a search."""

    metric: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TrialStanding:
    """Mean of a trial over several seeds, and half of its 95% confidence interval if known."""

    mean: float
    ci_half_width: float | None
    seeds: int


@dataclass
class SearchState:
    metric: str = ""
    mode: str = "min"
    metrics: list[str] = field(default_factory=list)
    """The first metric, further objectives, and constraints."""
    further_objectives: list[ObjectiveState] = field(default_factory=list)
    constraints: list[ConstraintState] = field(default_factory=list)
    planned: int = 0
    scheduler: str = ""
    space: dict[str, str] = field(default_factory=dict)
    max_concurrent: int = 0
    reason: str = ""
    started: float | None = None
    seconds: float | None = None
    finished: bool = False
    best_name: str = ""
    """The winner that the search logged at its end; before that, `best` is the best of the finished trials."""
    best_fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprints of all stages with the values of the best trial."""
    ended_by: str = ""
    """Why the search ended early."""
    ci_half_widths: dict[str, float] = field(default_factory=dict)
    """Half of the 95% confidence interval of the mean of each replicated trial."""
    ties: list[str] = field(default_factory=list)
    pareto_front: list[str] = field(default_factory=list)
    trials: dict[str, TrialState] = field(default_factory=dict)

    @property
    def originals(self) -> list[TrialState]:
        """The trials without replicates, which only estimate the variance of other trials."""
        return [trial for trial in self.trials.values() if trial.origin != "replicate"]

    @property
    def weighted(self) -> bool:
        """Whether the value of a trial is a weighted sum of metrics."""
        return any(item.weight is not None for item in self.further_objectives)

    @property
    def objectives(self) -> list[tuple[str, str]]:
        """(metric, mode) of each objective."""
        return objectives(self.metric, self.mode, self.further_objectives)

    @property
    def value_name(self) -> str:
        return "weighted sum" if self.weighted else self.metric or "value"

    @property
    def standings(self) -> dict[str, TrialStanding]:
        """Mean over seeds of the replicated trials, by name."""
        replicates: dict[str, list[float]] = {}
        for trial in self.trials.values():
            if trial.origin == "replicate" and trial.status == "done" and trial.value is not None:
                replicates.setdefault(trial.of, []).append(trial.value)
        replicated = [self.trials[name] for name in replicates if name in self.trials]
        return {
            trial.name: TrialStanding(
                fmean([trial.value, *replicates[trial.name]]),
                self.ci_half_widths.get(trial.name),
                1 + len(replicates[trial.name]),
            )
            for trial in replicated
            if trial.status == "done" and trial.value is not None
        }

    @property
    def ranked(self) -> list[TrialState]:
        """The trials without replicates, best first (events/ranking.py). The winner of an ended search is first."""
        standings = self.standings

        def key(trial: TrialState) -> tuple[bool, RankKey]:
            standing = standings.get(trial.name)
            mean = standing.mean if standing else None
            done = trial.status == "done"
            rank = rank_key(self.mode, value=trial.value, done=done, feasible=trial.feasible, mean_over_seeds=mean)
            return trial.name != self.best_name, rank

        return sorted(self.originals, key=key)

    @property
    def best(self) -> TrialState | None:
        if self.best_name in self.trials:
            return self.trials[self.best_name]
        return next((trial for trial in self.ranked if trial.value is not None and trial.status == "done"), None)

    def count(self, *statuses: TrialStatus) -> int:
        return sum(trial.status in statuses for trial in self.trials.values())

    @property
    def total(self) -> int:
        return max(self.planned, len(self.trials))

    def time_left(self, now: float) -> float | None:
        """Estimate from the median duration of ended trials, divided by the number of concurrent trials."""
        times = [t.seconds for t in self.trials.values() if t.status in ("done", "stopped") and t.seconds]
        # The first trial is not typical: it starts the processes that later ones reuse, and may be stopped early.
        if self.finished or len(times) < min(MIN_TRIALS, self.total):
            return None
        typical = median(times)
        running = [trial for trial in self.trials.values() if trial.status == "running"]
        waiting = self.total - self.count("running", "done", "stopped", "failed")
        left = sum(max(0.0, typical - (now - (trial.started or now))) for trial in running)
        return (left + waiting * typical) / max(1, self.max_concurrent or len(running))

    def curve(self, trial: TrialState) -> list[tuple[int, float]]:
        """Return (step, value) of the intermediate values of the metric.

        If the metric was not reported, return the held-out loss (or the training loss) of the stage in its name: for
        `eval.sft.domain.loss` that is the training stage `sft`.
        """
        own = [
            (step, trial.points[step][self.metric])
            for step in sorted(trial.points)
            if self.metric in trial.points[step]
        ]
        if own:
            return own
        trained = [stage for stage in trial.stages.values() if stage.points]
        named = [stage for stage in trained if stage.name in self.metric.split(".")]
        for stage in (named or trained)[-1:]:
            for key in (self.metric, self.metric.rpartition(".")[2], "eval_loss", "loss"):
                values = [(point.step, point.values[key]) for point in stage.curve if key in point.values]
                # A metric that ends in `loss` is a held-out loss: the training loss is the last resort.
                if values and (key != "loss" or not any("eval_loss" in point.values for point in stage.curve)):
                    return values
        return []


@dataclass
class RunState:
    run: str = ""
    file: str = ""
    text: str = ""
    command: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    status: RunStatus = "pending"
    message: str = ""
    invocations: int = 0
    started: float | None = None
    seconds: float | None = None
    ray_start_seconds: float | None = None
    connecting: str = ""
    """The Ray cluster that the run is connecting to and the time limit; "" otherwise."""
    last_event: float | None = None
    stages: dict[str, StageState] = field(default_factory=dict)
    search: SearchState | None = None
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The summary tables of the run, by title."""
    overhead: dict[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[Failure]:
        """Failures of the stages of the run. A failed trial does not fail the run."""
        return [stage.error for stage in self.stages.values() if stage.error]

    def elapsed(self, now: float) -> float | None:
        if self.seconds is not None:
            return self.seconds
        return None if self.started is None else max(0.0, now - self.started)

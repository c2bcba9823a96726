"""What a run looks like at one moment: stages, trials, the search and the run, and what follows from them.

Filled by `tunery.events.event_reducer` from the event log; read by the terminal's table and by the report.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Literal

from tunery.spec.overrides import final_values

Status = Literal["waiting", "running", "done", "reused", "failed"]
TrialStatus = Literal["waiting", "running", "done", "stopped", "failed"]
RunStatus = Literal["waiting", "running", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class Point:
    """A point of a training's curves. `values`: those of loss, eval_loss, rows .. measured at `step`."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """Why a stage failed, in the words of the error that it raised."""

    stage: str
    message: str
    cause: str = ""
    remedy: str = ""
    log: str = ""
    trial: str = ""


MIN_TRIALS = 2
"""So many trials must have ended before a search's time is estimated from theirs."""


@dataclass
class StageState:
    """One stage of the run, or of one trial when `trial` is set."""

    name: str
    kind: str = ""
    trial: str = ""
    inputs: list[str] = field(default_factory=list)
    status: Status = "waiting"
    detail: str = ""
    fingerprint: str = ""
    artifact: str = ""
    started: float | None = None
    finished: float | None = None
    seconds: float | None = None
    done: float = 0
    total: float = 0
    """0 when it is not known."""
    unit: str = ""
    rate: float | None = None
    """Units per second over the last `RATE_WINDOW_SECONDS` (state.py)."""
    eta_seconds: float | None = None
    """As of the last progress event, None until it means something (state.py); `time_left` counts on from there."""
    first_progress: tuple[float, float] | None = None
    """(time, done) of the first event with progress: what came before it is start-up, not speed."""
    advances: int = 0
    """Progress events since that one."""
    facts: dict[str, Any] = field(default_factory=dict)
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    preview: dict[str, Any] = field(default_factory=dict)
    """Of a training: rows as its model gets them (models/preview.py)."""
    error: Failure | None = None
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    """(time, done) of the progress events that the speed is taken over."""

    @property
    def curve(self) -> list[Point]:
        return [Point(step, self.points[step]) for step in sorted(self.points)]

    def elapsed(self, now: float) -> float | None:
        """Seconds used so far, or in all once it has ended."""
        if self.seconds is not None:
            return self.seconds
        if self.started is None or self.status == "waiting":
            return None
        return max(0.0, (self.finished or now) - self.started)

    def time_left(self, now: float) -> float | None:
        if self.status != "running" or self.eta_seconds is None or not self.recent:
            return None
        return max(0.0, self.eta_seconds - (now - self.recent[-1][0]))

    def reset(self) -> None:
        """Back to waiting, as a new invocation begins. The curve, the preview and what they belong to are kept."""
        fresh = StageState(self.name, self.kind, self.trial, self.inputs)
        fresh.fingerprint, fresh.points, fresh.preview = self.fingerprint, self.points, self.preview
        self.__dict__.update(fresh.__dict__)


@dataclass
class TrialState:
    """One trial of the search. `points` are intermediate values of the metric that belong to no stage."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    """first, drawn, added, cloned, descendant or replicate; empty in logs from before it was told."""
    of: str = ""
    """The trial that it is cloned or descended from, or repeats."""
    status: TrialStatus = "waiting"
    value: float | None = None
    """The metric, or the weighted sum."""
    values: dict[str, float] = field(default_factory=dict)
    """By metric."""
    feasible: bool = True
    """Keeps to the constraints, as far as anyone told."""
    steps: float | None = None
    tokens: float | None = None
    started: float | None = None
    seconds: float | None = None
    error: str = ""
    stages: dict[str, StageState] = field(default_factory=dict)
    points: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def present(self) -> dict[str, Any]:
        """Its values at its end; of a descendant others than those that it began with."""
        return final_values(self.overrides)

    @property
    def current(self) -> StageState | None:
        """The stage that the trial is at: the one that runs, else the last one that has begun."""
        begun = [stage for stage in self.stages.values() if stage.status != "waiting"]
        running = [stage for stage in begun if stage.status == "running"]
        return running[-1] if running else begun[-1] if begun else None


@dataclass(frozen=True)
class ObjectiveState:
    """A metric that a search has beside its first one; without a `weight` it is optimised by itself."""

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
    """What several seeds say of a trial: their mean, and half of its 95% interval where it is known."""

    mean: float
    half: float | None
    seeds: int


@dataclass
class SearchState:
    metric: str = ""
    mode: str = "min"
    metrics: list[str] = field(default_factory=list)
    """The first one, further ones, those of constraints."""
    also: list[ObjectiveState] = field(default_factory=list)
    bounds: list[ConstraintState] = field(default_factory=list)
    planned: int = 0
    scheduler: str = ""
    space: dict[str, str] = field(default_factory=dict)
    max_concurrent: int = 0
    reason: str = ""
    started: float | None = None
    seconds: float | None = None
    finished: bool = False
    best_name: str = ""
    """As the search itself told at its end; `best` before that is the best of the finished trials."""
    best_fingerprints: dict[str, str] = field(default_factory=dict)
    """Of all stages with the best trial's values; empty in logs from before they were told."""
    ended_by: str = ""
    """What ended it before its last trial."""
    halves: dict[str, float] = field(default_factory=dict)
    """Half of the 95% interval of each repeated trial's mean, as the search told at its end."""
    ties: list[str] = field(default_factory=list)
    front: list[str] = field(default_factory=list)
    trials: dict[str, TrialState] = field(default_factory=dict)

    @property
    def own(self) -> list[TrialState]:
        """Without the replicates, which only say how sure the value of another trial is."""
        return [trial for trial in self.trials.values() if trial.origin != "replicate"]

    @property
    def weighted(self) -> bool:
        """The value of a trial is a sum of metrics."""
        return any(item.weight is not None for item in self.also)

    @property
    def objectives(self) -> list[tuple[str, str]]:
        """(metric, mode) of what is optimised apart."""
        first = [(self.metric, self.mode)]
        return first if self.weighted else [*first, *((item.metric, item.mode) for item in self.also)]

    @property
    def value_name(self) -> str:
        return "weighted sum" if self.weighted else self.metric or "value"

    @property
    def standings(self) -> dict[str, TrialStanding]:
        """Of the trials that were repeated, by name."""
        again: dict[str, list[float]] = {}
        for trial in self.trials.values():
            if trial.origin == "replicate" and trial.status == "done" and trial.value is not None:
                again.setdefault(trial.of, []).append(trial.value)
        repeated = [self.trials[name] for name in again if name in self.trials]
        return {
            trial.name: TrialStanding(
                fmean([trial.value, *again[trial.name]]), self.halves.get(trial.name), 1 + len(again[trial.name])
            )
            for trial in repeated
            if trial.status == "done" and trial.value is not None
        }

    @property
    def ranked(self) -> list[TrialState]:
        """Without replicates, best first. A stopped trial got its value with less training, so those that ran to
        their end lead; of them those that keep to the constraints, then those that were repeated, by their mean; a
        single value that beats such a mean may be luck. Trials without a value are last. A search that has ended says
        itself who leads."""
        sign = -1.0 if self.mode == "max" else 1.0
        standings = self.standings

        def place(trial: TrialState) -> tuple[bool, bool, bool, bool, bool, float]:
            standing = standings.get(trial.name)
            value = standing.mean if standing else trial.value
            behind, unfinished = trial.name != self.best_name, trial.status != "done"
            return behind, value is None, unfinished, not trial.feasible, standing is None, sign * (value or 0.0)

        return sorted(self.own, key=place)

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
        """What is left of a typical trial for each open one, spread over those that run at a time."""
        times = [t.seconds for t in self.trials.values() if t.status in ("done", "stopped") and t.seconds]
        # The first trial also starts the processes that later ones reuse, and may be one that was stopped early.
        if self.finished or len(times) < min(MIN_TRIALS, self.total):
            return None
        typical = median(times)
        running = [trial for trial in self.trials.values() if trial.status == "running"]
        waiting = self.total - self.count("running", "done", "stopped", "failed")
        left = sum(max(0.0, typical - (now - (trial.started or now))) for trial in running)
        return (left + waiting * typical) / max(1, self.max_concurrent or len(running))

    def curve(self, trial: TrialState) -> list[tuple[int, float]]:
        """(step, value) on the way to the trial's metric.

        The metric itself where it was reported, else the held-out loss (or the loss) of the stage that the
        metric names: of `eval.sft.domain.loss` that is the training stage `sft`.
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
                # A metric that ends in `loss` is a held-out loss: the training's own is the last resort.
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
    status: RunStatus = "waiting"
    message: str = ""
    invocations: int = 0
    started: float | None = None
    seconds: float | None = None
    ray_start_seconds: float | None = None
    connecting: str = ""
    """The Ray cluster that is being connected to, and for how long at most; "" once it answered or did not."""
    last_event: float | None = None
    stages: dict[str, StageState] = field(default_factory=dict)
    search: SearchState | None = None
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The tables that the run ends with, by title."""
    overhead: dict[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[Failure]:
        """Of the run's own stages; a failed trial is told with the trial and does not fail the run."""
        return [stage.error for stage in self.stages.values() if stage.error]

    def elapsed(self, now: float) -> float | None:
        if self.seconds is not None:
            return self.seconds
        return None if self.started is None else max(0.0, now - self.started)

"""Translates events of the log to W&B actions, as plain data that can be tested without wandb.

There is one W&B run for every stage that did work in this invocation of the command, one for every trial that it
started, and one for the experiment ("comparison"), all in one group. The ids are hashes, so that a resumed command
continues the same W&B runs:

    job_type      id is the hash of               name          x-axis
    stage kind    run, stage, fingerprint         run/stage     step
    trial         run, trial, overrides           trial         <stage>/step, since a trial may train more than once
    comparison    run                             run           none

A trial that an edited experiment retrains, under the same name and overrides, gets a new W&B run, because W&B cannot
delete the first curve. A metric that is logged again at the same step after resuming from a checkpoint keeps its first
value in W&B; the report and the terminal show the last one. Both are equal, unless the training restarted because
`compute` changed.

A trial's config has its overrides, its `origin`, and for a clone or a replicate the original trial (`of`). Its origin
is also a tag, unless the trial was sampled. wandb_search.py builds the tables of the search.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tunery.events.event_log import Event
from tunery.events.event_reducer import apply
from tunery.events.run_state import RunState
from tunery.reporting.wandb_search import search_summary, search_tables
from tunery.reporting.wandb_values import HistoryValue, flatten, histograms, numbers, responses, table

INTERRUPTED = 255
"""W&B's exit code for a run that was stopped from outside."""
EXIT_CODES = {"done": 0, "failed": 1}
CURVE_EVENTS = ("metrics", "progress")
"""Events that the final tables do not need. They are not applied to the state, so that it holds no curves."""


@dataclass(frozen=True)
class Open:
    """Create a W&B run, or resume it if it exists."""

    id: str
    name: str
    job_type: str
    config: dict[str, Any]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class WandbAxis:
    """Use `<prefix>step` as the x-axis of metrics named `<prefix>...`."""

    id: str
    prefix: str


@dataclass(frozen=True)
class Log:
    """A row of the run's history. `time`: seconds since the epoch, when it was logged. `always`: write it even if the
    run already has such a row."""

    id: str
    values: dict[str, HistoryValue]
    time: float
    always: bool = False


@dataclass(frozen=True)
class Summarize:
    id: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Finish:
    id: str
    exit_code: int = 0


Action = Open | WandbAxis | Log | Summarize | Finish


@dataclass(frozen=True)
class _ActiveStage:
    """A stage that has started and not ended. `id`: its W&B run, or its trial's."""

    id: str
    kind: str
    fingerprint: str


def plan(
    events: Sequence[Event],
    run: str,
    experiment: Mapping[str, Any],
    stored: Mapping[str, int | None] = MappingProxyType({}),
    log_texts: bool = False,
) -> list[Action]:
    """Return all actions for a complete log. Only the last of several invocations is mirrored."""
    starts = [index for index, event in enumerate(events) if event["event"] == "run_started"] or [0]
    translator = Translator(run, experiment, stored, log_texts)
    return [
        *translator.before(events[: starts[-1]]),
        *translator.translate(events[starts[-1] :]),
        *translator.close(),
    ]


def run_id(run: str, stage: str = "", trial: str = "", fingerprint: str = "") -> str:
    """W&B run id: 20 hexadecimal digits, a hash of the arguments."""
    return hashlib.sha256(json.dumps([run, stage, trial, fingerprint]).encode()).hexdigest()[:20]


class Translator:
    """Translates earlier events with `before`, new events with `translate`, and finishes all runs with `close`.

    When an invocation is killed, W&B lacks the last seconds of the log, which is authoritative. A resumed run is
    therefore sent its complete curve from the log; wandb_files.History skips the rows that W&B already has.

    `stored`: exit code by id of the runs with a local W&B file, None without one. A run that ended in an earlier
    invocation, but not in its file, is reopened, completed and finished. `log_texts`: as in `tracking.wandb`.
    """

    def __init__(
        self,
        run: str,
        experiment: Mapping[str, Any],
        stored: Mapping[str, int | None] = MappingProxyType({}),
        log_texts: bool = False,
    ) -> None:
        self.late = 0
        """Points that came after the end of their stage, and were dropped."""
        self._run = run
        self._experiment = experiment
        self._stored = stored
        self._log_texts = log_texts
        self._state = RunState()
        self._summary_id = run_id(run)
        self._before: dict[
            str, list[WandbAxis | Log]
        ] = {}  # curves of earlier invocations, by id of runs that may resume
        self._fingerprints: dict[tuple[str, str], str] = {}  # (trial's id, stage) -> fingerprint of its logged curve
        self._reset()

    def _reset(self) -> None:
        self._open: dict[str, set[str]] = {}  # id -> prefixes whose axis is defined
        self._active: dict[tuple[str, str], _ActiveStage] = {}  # by trial and stage
        self._ended: set[tuple[str, str]] = set()
        self._trials: dict[str, str] = {}  # trial -> id, while it runs
        self._pending: dict[str, list[Action]] = {}  # id of a trial -> actions delayed until it logs a value
        self._stopped: set[str] = set()  # ids of stopped trials, which may still log a step or two

    def before(self, events: Iterable[Event]) -> list[Action]:
        """Process the events of earlier invocations; return the actions that W&B has not received yet.

        Call at most once, and before `translate`.
        """
        runs: dict[str, list[Action]] = {}  # id -> actions since it was last opened
        missing: dict[str, list[Action]] = {}
        ended: set[str] = set()  # runs that ended in this invocation, and have no W&B file
        for event in events:
            actions = self.translate([event])
            if event["event"] == "run_started":
                missing |= {id: runs[id] for id in ended}  # the previous invocation was killed
                ended.clear()
            elif event["event"] == "run_finished":  # the invocation has sent them all
                for id in ended:
                    del runs[id]
                ended.clear()
            for action in actions:
                id = action.id
                if isinstance(action, Open):
                    runs[id] = []
                    missing.pop(id, None)
                    ended.discard(id)
                if id == self._summary_id:  # each invocation logs its tables
                    continue
                runs[id].append(action)
                if isinstance(action, WandbAxis | Log):
                    self._before.setdefault(id, []).append(action)
                elif isinstance(action, Finish) and action.exit_code != INTERRUPTED:
                    if action.exit_code == 0:
                        self._before.pop(id, None)
                    if id not in self._stored:
                        ended.add(id)
                    elif self._stored[id] != action.exit_code:
                        missing[id] = runs.pop(id)
                    else:
                        del runs[id]  # complete in W&B, so its curve is not needed
        missing |= {id: runs[id] for id in ended}
        self._reset()
        self.late = 0
        return [action for actions in missing.values() for action in actions]

    def translate(self, events: Iterable[Event]) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            kind = str(event["event"])
            if kind == "run_started":
                actions += [Finish(id, INTERRUPTED) for id in self._open]  # left open by a killed invocation
                self._reset()
            if kind not in CURVE_EVENTS:
                apply(self._state, event)
            if self._summary_id not in self._open:
                actions += self._begin(Open(self._summary_id, self._run, "comparison", self._config()))
            handler = _HANDLERS.get(kind)
            if handler is not None:
                actions += handler(self, event)
        return actions

    def close(self) -> list[Action]:
        """Log tables and summary of the experiment, and finish all runs; those that are still open were interrupted."""
        if self._summary_id not in self._open:
            return []
        actions: list[Action] = [Finish(id, INTERRUPTED) for id in self._open if id != self._summary_id]
        values: dict[str, HistoryValue] = {}
        for title, summary in self._state.comparisons.items():
            values[_slug(title)] = table(summary["columns"], summary["rows"])
        values |= search_tables(self._state, self._log_texts)
        for name, stage in self._state.stages.items():
            values |= histograms(stage.facts, f"{name}.")
        if values:
            actions.append(Log(self._summary_id, values, self._state.last_event or 0.0, always=True))
        exit_code = EXIT_CODES.get(self._state.status, INTERRUPTED)
        return [*actions, Summarize(self._summary_id, self._summary()), Finish(self._summary_id, exit_code)]

    # Events of stages: the experiment's own and those of trials.

    def _stage_started(self, event: Event) -> list[Action]:
        trial, stage, fingerprint = _trial(event), _stage(event), str(event.get("fingerprint", ""))
        id = self._trials.get(trial, "") if trial else run_id(self._run, stage, "", fingerprint)
        self._active[trial, stage] = _ActiveStage(id, str(event.get("kind", "")), fingerprint)
        self._ended.discard((trial, stage))
        return []  # it may wait for another run that builds the same artifact: its first progress opens the W&B run

    def _progress(self, event: Event) -> list[Action]:
        active = self._active.get((_trial(event), _stage(event)))
        return self._open_stage(event, active) if active and event.get("done") else []

    def _metrics(self, event: Event) -> list[Action]:
        trial, stage = _trial(event), _stage(event)
        values = {"step": event.get("step"), **(event.get("values") or {})}
        if trial and not stage:
            id = self._trials.get(trial, "")
            return self._open_trial(id) + self._points(event, id, values, prefix="")
        active = self._active.get((trial, stage))
        if active is None:  # the curve of a reused stage, logged again for the report
            self.late += (trial, stage) in self._ended
            return []
        if trial:
            id = self._curve_id(trial, stage, active)
            return self._open_trial(id) + self._points(event, id, values, prefix=f"{stage}/")
        return self._open_stage(event, active) + self._points(event, active.id, values, prefix="")

    def _points(self, event: Event, id: str, values: Mapping[str, Any], prefix: str) -> list[Action]:
        if id not in self._open:
            self.late += id not in self._stopped
            return []
        point = Log(id, {prefix + name: number for name, number in numbers(values).items()}, float(event["t"]))
        if prefix in self._open[id]:
            return [point]
        self._open[id].add(prefix)
        return [WandbAxis(id, prefix), point]

    def _stage_finished(self, event: Event) -> list[Action]:
        ended, facts = self._end(event), event.get("facts") or {}
        if _trial(event):
            return self._summarize_trial(event, flatten(facts, f"{_stage(event)}."))
        if event.get("reused") and ended.id not in self._open:
            return []
        actions = self._open_stage(event, ended)
        values = histograms(facts) | (responses(facts) if self._log_texts else {})
        if values:
            actions.append(Log(ended.id, values, float(event["t"])))
        more = {"seconds": event.get("seconds"), "reused": bool(event.get("reused")), "artifact": event.get("artifact")}
        return [*actions, Summarize(ended.id, flatten({**facts, **more})), self._finish(ended.id, 0)]

    def _stage_failed(self, event: Event) -> list[Action]:
        ended = self._end(event)
        error = {f"error.{key}": event[key] for key in ("message", "cause", "remedy", "log") if event.get(key)}
        if _trial(event):
            return self._summarize_trial(event, flatten(error, f"{_stage(event)}."))
        return [*self._open_stage(event, ended), Summarize(ended.id, error), self._finish(ended.id, 1)]

    def _end(self, event: Event) -> _ActiveStage:
        """Remove and return the active stage; one that logged no start is built from its last event."""
        key = _trial(event), _stage(event)
        active = self._active.pop(key, None)
        if active is not None or not event.get("reused"):
            self._ended.add(key)
        fingerprint = str(event.get("fingerprint", ""))
        id = run_id(self._run, _stage(event), "", fingerprint)
        return active or _ActiveStage(id, str(event.get("kind", "")), fingerprint)

    def _summarize_trial(self, event: Event, values: dict[str, Any]) -> list[Action]:
        id = self._trials.get(_trial(event), "")
        actions: list[Action] = [Summarize(id, values)]
        if id in self._pending:
            self._pending[id] += actions
            return []
        return actions if id in self._open else []

    def _open_stage(self, event: Event, stage: _ActiveStage) -> list[Action]:
        """Open the W&B run of a stage that is not a trial's, unless it is open."""
        if _trial(event) or stage.id in self._open:
            return []
        name = _stage(event)
        config = {**self._spec(name), "stage": name, "fingerprint": stage.fingerprint}
        return self._begin(Open(stage.id, f"{self._run}/{name}", stage.kind, config))

    # Trials.

    def _trial_started(self, event: Event) -> list[Action]:
        trial = _trial(event)
        overrides = event.get("overrides") or {}
        id = run_id(self._run, "", trial, json.dumps(overrides, sort_keys=True))
        self._trials[trial] = id
        if id in self._open:
            return []
        details = {key: event[key] for key in ("origin", "of") if event.get(key)}
        origin = str(event.get("origin") or "")
        tags = (origin,) if origin not in ("", "sampled") else ()
        self._pending[id] = [Open(id, trial, "trial", {**overrides, **details}, tags)]
        return []

    def _curve_id(self, trial: str, stage: str, active: _ActiveStage) -> str:
        """The trial's W&B run; a new one if an earlier invocation logged the curve of another version of the stage to
        it. The experiment was edited since, and the two curves must not be joined."""
        id = active.id
        logged = self._fingerprints.setdefault((id, stage), active.fingerprint)
        if logged == active.fingerprint or id not in self._pending:
            return id
        opening, *actions = self._pending.pop(id)
        assert isinstance(opening, Open), "_trial_started puts it first"
        new = run_id(id, stage, trial, active.fingerprint)
        self._pending[new] = [dataclasses.replace(action, id=new) for action in (opening, *actions)]
        self._trials[trial] = new
        self._active = {
            (of, name): dataclasses.replace(one, id=new) if of == trial else one
            for (of, name), one in self._active.items()
        }
        return new

    def _open_trial(self, id: str) -> list[Action]:
        """Return the delayed actions of a trial that logs its first value, when its curve's fingerprint is known."""
        pending = self._pending.pop(id, [])
        return [action for one in pending for action in (self._begin(one) if isinstance(one, Open) else [one])]

    def _trial_finished(self, event: Event) -> list[Action]:
        id = self._trials.pop(_trial(event), "")
        actions = self._open_trial(id)
        if id not in self._open:  # of an earlier invocation and logged again: only the tables have it
            return []
        if event.get("state") == "stopped":
            self._stopped.add(id)
        name = self._state.search.value_name if self._state.search else "value"
        summary = {key: event.get(key) for key in ("state", "seconds", "steps", "tokens", "rows", "feasible")}
        summary["error"] = event.get("error") or None
        values = flatten({**summary, **(event.get("values") or {}), name: event.get("value")})
        return [*actions, Summarize(id, values), self._finish(id, 1 if event.get("state") == "failed" else 0)]

    # Runs.

    def _begin(self, opening: Open) -> list[Action]:
        before = self._before.pop(opening.id, [])
        self._open[opening.id] = {action.prefix for action in before if isinstance(action, WandbAxis)}
        return [opening, *before]

    def _finish(self, id: str, exit_code: int) -> Finish:
        self._open.pop(id, None)
        return Finish(id, exit_code)

    # Configs and summary.

    def _config(self) -> dict[str, Any]:
        command = {"command": self._state.command} if self._log_texts else {}
        return {**self._experiment, "versions": self._state.versions, **command}

    def _spec(self, stage: str) -> dict[str, Any]:
        """Config of the stage; for `sft (best trial)` with the best trial's values."""
        stages = self._experiment.get("stages") or {}
        name, _, label = stage.partition(" (")
        spec: dict[str, Any] = copy.deepcopy(dict(stages.get(name) or {}))
        best = self._state.search.best if label and self._state.search else None
        for path, value in best.overrides.items() if best else ():
            first, *inner, last = path.split(".")
            if first == name:
                parent = spec
                for key in inner:
                    parent = parent.setdefault(key, {})
                parent[last] = value
        return spec

    def _summary(self) -> dict[str, Any]:
        values: dict[str, Any] = {"state": self._state.status, "seconds": self._state.seconds}
        values["message"] = self._state.message or None
        for title, summary in self._state.comparisons.items():
            values |= _cells(_slug(title), summary["columns"], summary["rows"])
        if self._state.search is not None:
            values |= search_summary(self._state.search)
        values["overhead"] = self._state.overhead
        for name, stage in self._state.stages.items():
            values |= flatten(stage.facts, f"{name}.")
        return flatten(values)


_HANDLERS = {
    "stage_started": Translator._stage_started,
    "progress": Translator._progress,
    "metrics": Translator._metrics,
    "stage_finished": Translator._stage_finished,
    "stage_failed": Translator._stage_failed,
    "trial_started": Translator._trial_started,
    "trial_finished": Translator._trial_finished,
}


def _cells(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The numbers of a table, named `<table>.<leading text cells of the row>.<column>`."""
    result: dict[str, Any] = {}
    for index, row in enumerate(rows):
        texts: list[str] = []
        for cell in row:
            if not isinstance(cell, str):
                break
            texts.append(cell)
        values = numbers(dict(zip(columns, row, strict=False)))
        label = ".".join([name, *texts])
        if any(f"{label}.{column}" in result for column in values):
            label += f".{index}"
        result |= {f"{label}.{column}": number for column, number in values.items()}
    return result


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "result"


def _stage(event: Event) -> str:
    return str(event.get("stage") or "")


def _trial(event: Event) -> str:
    return str(event.get("trial") or "")

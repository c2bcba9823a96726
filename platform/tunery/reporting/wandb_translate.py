"""From the event log to what W&B is to be told, as plain data: no wandb is needed to read or to test it.

One W&B run for every stage that did work in this invocation of the command, one for every trial that it started, and
one for the whole ("comparison"), all in one group. The ids are hashes, so that the resumed command goes on in the same
W&B runs:

    job_type      id is the hash of               name          x-axis
    stage kind    run, stage, fingerprint         run/stage     step
    trial         run, trial, overrides           trial         <stage>/step, since a trial may train more than once
    comparison    run                             run           none

A trial that an edited experiment trains anew, under the same name and overrides, has a run of its own, since W&B can't
take back the first curve. A metric that is measured at the same step again after a checkpoint keeps its first value
there; the report and the terminal show the last one. A resumed training repeats them exactly, unless other `compute`
made it start over.

A trial's config are its overrides, and where it comes from: `origin`, and of a clone or a replicate `of`; all but those
that were drawn bear their origin as a tag. What is told of the search as a whole is in `wandb_search`.
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
from tunery.reporting.wandb_values import Drawn, answers, flatten, histograms, numbers, table

INTERRUPTED = 255
"""W&B's exit code for what was stopped from outside."""
EXIT_CODES = {"done": 0, "failed": 1}
CURVES = ("metrics", "progress")
"""Events that the tables at the end don't need: they are not folded, so that no curve is held in memory."""


@dataclass(frozen=True)
class Open:
    """A W&B run begins, or goes on when it was begun before."""

    id: str
    name: str
    job_type: str
    config: dict[str, Any]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Axis:
    """Metrics named `<prefix>...` are drawn over `<prefix>step`."""

    id: str
    prefix: str


@dataclass(frozen=True)
class Log:
    """A row of the run's history. `time`: seconds since the epoch, when it was measured. `again`: it is written also
    where the run has such a row already."""

    id: str
    values: dict[str, Drawn]
    time: float
    again: bool = False


@dataclass(frozen=True)
class Summarize:
    id: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Finish:
    id: str
    exit_code: int = 0


Action = Open | Axis | Log | Summarize | Finish


@dataclass(frozen=True)
class _Begun:
    """A stage between its stage_started and its end. A run of the file's own has a W&B run of its own."""

    id: str
    kind: str
    fingerprint: str


def plan(
    events: Sequence[Event],
    run: str,
    experiment: Mapping[str, Any],
    stored: Mapping[str, int | None] = MappingProxyType({}),
) -> list[Action]:
    """All that W&B is told of a whole log; of several invocations the last one is mirrored."""
    starts = [index for index, event in enumerate(events) if event["event"] == "run_started"] or [0]
    translator = Translator(run, experiment, stored)
    return [
        *translator.before(events[: starts[-1]]),
        *translator.translate(events[starts[-1] :]),
        *translator.close(),
    ]


def run_id(run: str, stage: str = "", trial: str = "", fingerprint: str = "") -> str:
    """W&B's id: 20 hexadecimal digits, the same for the same work."""
    return hashlib.sha256(json.dumps([run, stage, trial, fingerprint]).encode()).hexdigest()[:20]


class Translator:
    """`before` takes what the log holds already, `translate` what comes, `close` is the end.

    An invocation that is killed leaves W&B some seconds behind the log, and the log is what counts. So a run that
    resumes gets its whole curve from the log again, from its first point on; whoever writes the rows leaves out those
    that W&B has (wandb_files.History).

    `stored`: exit code by id of the runs that W&B has a file of, None where that has none. What ended in an earlier
    invocation, but not there, is opened again, given what is missing, and ended.
    """

    def __init__(
        self, run: str, experiment: Mapping[str, Any], stored: Mapping[str, int | None] = MappingProxyType({})
    ) -> None:
        self.late = 0
        """Points that came after the end of their stage, and were left out."""
        self._run = run
        self._experiment = experiment
        self._stored = stored
        self._state = RunState()
        self._whole = run_id(run)
        self._before: dict[str, list[Axis | Log]] = {}  # the curves of earlier invocations, of what may resume
        self._fingerprints: dict[tuple[str, str], str] = {}  # whose curve it is, by a trial's id and stage
        self._forget()

    def _forget(self) -> None:
        self._open: dict[str, set[str]] = {}  # id -> the prefixes whose axis is told
        self._begun: dict[tuple[str, str], _Begun] = {}  # by trial and stage
        self._ended: set[tuple[str, str]] = set()
        self._trials: dict[str, str] = {}  # trial -> id, while it runs
        self._coming: dict[str, list[Action]] = {}  # by id of a trial: what opens it once there is something to draw
        self._stopped: set[str] = set()  # ids of trials that take a step or two more until they hear of it

    def before(self, events: Iterable[Event]) -> list[Action]:
        """What the log holds of earlier invocations; returns what W&B still has to be told of it.

        Call at most once, and first.
        """
        runs: dict[str, list[Action]] = {}  # by id, since it was opened last
        missing: dict[str, list[Action]] = {}
        ended: set[str] = set()  # in this invocation, and nowhere in W&B's files
        for event in events:
            actions = self.translate([event])
            if event["event"] == "run_started":
                missing |= {id: runs[id] for id in ended}  # that invocation was killed
                ended.clear()
            elif event["event"] == "run_finished":  # it has told all of that
                for id in ended:
                    del runs[id]
                ended.clear()
            for action in actions:
                id = action.id
                if isinstance(action, Open):
                    runs[id] = []
                    missing.pop(id, None)
                    ended.discard(id)
                if id == self._whole:  # its tables are told by each invocation
                    continue
                runs[id].append(action)
                if isinstance(action, Axis | Log):
                    self._before.setdefault(id, []).append(action)
                elif isinstance(action, Finish) and action.exit_code != INTERRUPTED:
                    if action.exit_code == 0:
                        self._before.pop(id, None)
                    if id not in self._stored:
                        ended.add(id)
                    elif self._stored[id] != action.exit_code:
                        missing[id] = runs.pop(id)
                    else:
                        del runs[id]  # it is in W&B: no need to hold its curve
        missing |= {id: runs[id] for id in ended}
        self._forget()
        self.late = 0
        return [action for actions in missing.values() for action in actions]

    def translate(self, events: Iterable[Event]) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            kind = str(event["event"])
            if kind == "run_started":
                actions += [Finish(id, INTERRUPTED) for id in self._open]  # left open by an invocation that was killed
                self._forget()
            if kind not in CURVES:
                apply(self._state, event)
            if self._whole not in self._open:
                actions += self._begin(Open(self._whole, self._run, "comparison", self._config()))
            handler = _HANDLERS.get(kind)
            if handler is not None:
                actions += handler(self, event)
        return actions

    def close(self) -> list[Action]:
        """The tables and the summary of the whole; what is still open was interrupted."""
        if self._whole not in self._open:
            return []
        actions: list[Action] = [Finish(id, INTERRUPTED) for id in self._open if id != self._whole]
        pictures: dict[str, Drawn] = {}
        for title, told in self._state.comparisons.items():
            pictures[_slug(title)] = table(told["columns"], told["rows"])
        pictures |= search_tables(self._state)
        for name, stage in self._state.stages.items():
            pictures |= histograms(stage.facts, f"{name}.")
        if pictures:
            actions.append(Log(self._whole, pictures, self._state.last_event or 0.0, again=True))
        exit_code = EXIT_CODES.get(self._state.status, INTERRUPTED)
        return [*actions, Summarize(self._whole, self._summary()), Finish(self._whole, exit_code)]

    # What a stage of the file does, and what a stage of a trial does.

    def _stage_started(self, event: Event) -> list[Action]:
        trial, stage, fingerprint = _trial(event), _stage(event), str(event.get("fingerprint", ""))
        id = self._trials.get(trial, "") if trial else run_id(self._run, stage, "", fingerprint)
        self._begun[trial, stage] = _Begun(id, str(event.get("kind", "")), fingerprint)
        self._ended.discard((trial, stage))
        return []  # it may only wait for another run that makes the same: the first sign of work opens its W&B run

    def _progress(self, event: Event) -> list[Action]:
        begun = self._begun.get((_trial(event), _stage(event)))
        return self._work(event, begun) if begun and event.get("done") else []

    def _metrics(self, event: Event) -> list[Action]:
        trial, stage = _trial(event), _stage(event)
        values = {"step": event.get("step"), **(event.get("values") or {})}
        if trial and not stage:
            id = self._trials.get(trial, "")
            return self._open_trial(id) + self._points(event, id, values, prefix="")
        begun = self._begun.get((trial, stage))
        if begun is None:  # the curve of a reused stage, told again for the report
            self.late += (trial, stage) in self._ended
            return []
        if trial:
            id = self._id_of_curve(trial, stage, begun)
            return self._open_trial(id) + self._points(event, id, values, prefix=f"{stage}/")
        return self._work(event, begun) + self._points(event, begun.id, values, prefix="")

    def _points(self, event: Event, id: str, values: Mapping[str, Any], prefix: str) -> list[Action]:
        if id not in self._open:
            self.late += id not in self._stopped
            return []
        point = Log(id, {prefix + name: number for name, number in numbers(values).items()}, float(event["t"]))
        if prefix in self._open[id]:
            return [point]
        self._open[id].add(prefix)
        return [Axis(id, prefix), point]

    def _stage_finished(self, event: Event) -> list[Action]:
        begun, facts = self._end(event), event.get("facts") or {}
        if _trial(event):
            return self._of_trial(event, flatten(facts, f"{_stage(event)}."))
        if event.get("reused") and begun.id not in self._open:
            return []
        actions = self._work(event, begun)
        pictures = histograms(facts) | answers(facts)
        if pictures:
            actions.append(Log(begun.id, pictures, float(event["t"])))
        more = {"seconds": event.get("seconds"), "reused": bool(event.get("reused")), "artifact": event.get("artifact")}
        return [*actions, Summarize(begun.id, flatten({**facts, **more})), self._finish(begun.id, 0)]

    def _stage_failed(self, event: Event) -> list[Action]:
        begun = self._end(event)
        told = {f"error.{key}": event[key] for key in ("message", "cause", "remedy", "log") if event.get(key)}
        if _trial(event):
            return self._of_trial(event, flatten(told, f"{_stage(event)}."))
        return [*self._work(event, begun), Summarize(begun.id, told), self._finish(begun.id, 1)]

    def _end(self, event: Event) -> _Begun:
        """The stage that ends here. One whose beginning was not told is known by what its end tells."""
        key = _trial(event), _stage(event)
        begun = self._begun.pop(key, None)
        if begun is not None or not event.get("reused"):
            self._ended.add(key)
        fingerprint = str(event.get("fingerprint", ""))
        told = _Begun(run_id(self._run, _stage(event), "", fingerprint), str(event.get("kind", "")), fingerprint)
        return begun or told

    def _of_trial(self, event: Event, values: dict[str, Any]) -> list[Action]:
        id = self._trials.get(_trial(event), "")
        told: list[Action] = [Summarize(id, values)]
        if id in self._coming:
            self._coming[id] += told
            return []
        return told if id in self._open else []

    def _work(self, event: Event, begun: _Begun) -> list[Action]:
        """A stage of the file shows that it works: its W&B run is opened, once."""
        if _trial(event) or begun.id in self._open:
            return []
        stage = _stage(event)
        config = {**self._spec(stage), "stage": stage, "fingerprint": begun.fingerprint}
        return self._begin(Open(begun.id, f"{self._run}/{stage}", begun.kind, config))

    # Trials.

    def _trial_started(self, event: Event) -> list[Action]:
        trial = _trial(event)
        overrides = event.get("overrides") or {}
        id = run_id(self._run, "", trial, json.dumps(overrides, sort_keys=True))
        self._trials[trial] = id
        if id in self._open:
            return []
        origin = {key: event[key] for key in ("origin", "of") if event.get(key)}
        told = str(event.get("origin") or "")
        tags = (told,) if told not in ("", "drawn") else ()
        self._coming[id] = [Open(id, trial, "trial", {**overrides, **origin}, tags)]
        return []

    def _id_of_curve(self, trial: str, stage: str, begun: _Begun) -> str:
        """The trial's W&B run, or another where an earlier invocation drew in it the curve of a stage that is no longer
        the same: the experiment was edited, and neither curve should end in the other."""
        id = begun.id
        known = self._fingerprints.setdefault((id, stage), begun.fingerprint)
        if known == begun.fingerprint or id not in self._coming:
            return id
        opening, *told = self._coming.pop(id)
        assert isinstance(opening, Open), "_trial_started puts it first"
        new = run_id(id, stage, trial, begun.fingerprint)
        self._coming[new] = [dataclasses.replace(action, id=new) for action in (opening, *told)]
        self._trials[trial] = new
        self._begun = {
            (of, name): dataclasses.replace(one, id=new) if of == trial else one
            for (of, name), one in self._begun.items()
        }
        return new

    def _open_trial(self, id: str) -> list[Action]:
        """Called at the first sign that there is something to draw: until then the curve's fingerprint is not known."""
        coming = self._coming.pop(id, [])
        return [action for one in coming for action in (self._begin(one) if isinstance(one, Open) else [one])]

    def _trial_finished(self, event: Event) -> list[Action]:
        id = self._trials.pop(_trial(event), "")
        actions = self._open_trial(id)
        if id not in self._open:  # of an earlier invocation, told again: it is in the table
            return []
        if event.get("state") == "stopped":
            self._stopped.add(id)
        name = self._state.search.value_name if self._state.search else "value"
        told = {key: event.get(key) for key in ("state", "seconds", "steps", "tokens", "rows", "feasible")}
        told["error"] = event.get("error") or None
        values = flatten({**told, **(event.get("values") or {}), name: event.get("value")})
        return [*actions, Summarize(id, values), self._finish(id, 1 if event.get("state") == "failed" else 0)]

    # Runs.

    def _begin(self, opening: Open) -> list[Action]:
        before = self._before.pop(opening.id, [])
        self._open[opening.id] = {action.prefix for action in before if isinstance(action, Axis)}
        return [opening, *before]

    def _finish(self, id: str, exit_code: int) -> Finish:
        self._open.pop(id, None)
        return Finish(id, exit_code)

    # What the whole is described with.

    def _config(self) -> dict[str, Any]:
        return {**self._experiment, "versions": self._state.versions, "command": self._state.command}

    def _spec(self, stage: str) -> dict[str, Any]:
        """The stage as the file has it; of `sft (best trial)` with the best trial's values."""
        stages = self._experiment.get("stages") or {}
        name, _, label = stage.partition(" (")
        spec: dict[str, Any] = copy.deepcopy(dict(stages.get(name) or {}))
        best = self._state.search.best if label and self._state.search else None
        for path, value in best.overrides.items() if best else ():
            first, *inner, last = path.split(".")
            if first == name:
                place = spec
                for key in inner:
                    place = place.setdefault(key, {})
                place[last] = value
        return spec

    def _summary(self) -> dict[str, Any]:
        values: dict[str, Any] = {"state": self._state.status, "seconds": self._state.seconds}
        values["message"] = self._state.message or None
        for title, told in self._state.comparisons.items():
            values |= _cells(_slug(title), told["columns"], told["rows"])
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
    """The numbers of a table by `<table>.<the row's leading words>.<column>`."""
    found: dict[str, Any] = {}
    for index, row in enumerate(rows):
        words: list[str] = []
        for cell in row:
            if not isinstance(cell, str):
                break
            words.append(cell)
        told = numbers(dict(zip(columns, row, strict=False)))
        label = ".".join([name, *words])
        if any(f"{label}.{column}" in found for column in told):
            label += f".{index}"
        found |= {f"{label}.{column}": number for column, number in told.items()}
    return found


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "result"


def _stage(event: Event) -> str:
    return str(event.get("stage") or "")


def _trial(event: Event) -> str:
    return str(event.get("trial") or "")

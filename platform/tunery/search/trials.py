"""`tunery trials RUN`: the trials of a search, from the event log and the requests of a run. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from tunery.errors import RequestError
from tunery.events.event_log import Event
from tunery.events.formatting import as_number, count, duration, measure, overrides_text, short_paths
from tunery.events.run_state import RunState, SearchState, StageState, TrialState
from tunery.reporting.terminal_view import MARKS, STYLES, WIDE
from tunery.search.space import trial_id
from tunery.spec.error_messages import nearest

OPEN = ("running", "stopping", "pending")
"""States of trials that have not ended. stopping: a stop was requested, and the trial has not ended yet."""
COLUMNS = ("trial", "state", "value", "progress", "time")


@dataclass(frozen=True)
class TrialRow:
    """A row of the trial table."""

    name: str
    state: str
    value: float | None
    """The final metric, or the last intermediate one of a trial that has not ended."""
    done: float
    total: float
    """0 if unknown."""
    unit: str
    seconds: float | None
    overrides: dict[str, Any]
    origin: str
    of: str
    """The trial that it is a clone, a copy (PBT) or a replicate of."""
    error: str
    best: bool


@dataclass(frozen=True)
class Trials:
    """The trials of a run: open ones first, then ended ones, best first."""

    run: str
    file: str
    metric: str
    mode: str
    planned: int
    search_state: str
    """not started, running, interrupted (started, but no process runs it) or ended."""
    owner: str
    """The process that runs it; "" if there is none."""
    trials: tuple[TrialRow, ...]

    def find(self, name: str) -> TrialRow:
        """Return a trial by its name, the part after `trial-`, or a unique prefix of either. Raises RequestError."""
        by_name = {trial.name: trial for trial in self.trials}
        return by_name[trial_named(name, by_name, self.run)]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "metric": self.metric,
            "mode": self.mode,
            "planned": self.planned,
            "search": self.search_state,
            "running": bool(self.owner),
            "trials": [asdict(trial) for trial in self.trials],
        }

    def render(self, width: int) -> RenderableType:
        return Group(*_header_lines(self), *_table(self.trials, width))


def trial_named(requested: str, known: Iterable[str], run: str) -> str:
    """Return the full name of a trial. Raises RequestError if no trial or several trials match."""
    names = list(known)
    for word in (requested, f"trial-{requested}"):
        if word in names:
            return word
    matches = [name for name in names if requested and name.startswith((requested, f"trial-{requested}"))]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise RequestError(
            f"`{requested}` matches {len(matches)} trials of `{run}`",
            cause=", ".join(matches),
            remedy="give a longer prefix",
        )
    cause = "" if names else "no trial has started"
    near = nearest(requested if requested.startswith("trial-") else f"trial-{requested}", names)
    raise RequestError(f"the run `{run}` has no trial `{requested}`", cause=cause, remedy=near)


def list_trials(
    state: RunState,
    events: Sequence[Event],
    requests: Sequence[Mapping[str, Any]],
    stop_requested: Callable[[str], bool],
    owner: str,
    now: float,
) -> Trials:
    """Return the trials of a run. `requests` are trials to add (search/steering.py)."""
    search = state.search or SearchState()
    origins = _origins(events)
    running = bool(owner)
    rows = [
        _trial_row(trial, search, origins.get(trial.name, ("", "")), stop_requested(trial.name), running, now)
        for trial in search.ranked
    ]
    for request in requests:
        name = trial_id(request["overrides"])
        if all(trial.name != name for trial in rows):
            trial_state = "stopped" if stop_requested(name) else "pending"
            fields = (dict(request["overrides"]), request["origin"], request["of"])
            rows.append(TrialRow(name, trial_state, None, 0, 0, "", None, *fields, error="", best=False))
    rows.sort(key=lambda trial: OPEN.index(trial.state) if trial.state in OPEN else len(OPEN))
    search_state = (
        "ended"
        if search.finished
        else "not started"
        if state.search is None
        else "running"
        if running
        else "interrupted"
    )
    return Trials(
        state.run, state.file, search.value_name, search.mode, search.planned, search_state, owner, tuple(rows)
    )


def _origins(events: Iterable[Event]) -> dict[str, tuple[str, str]]:
    """Return (origin, other trial) by trial."""
    return {
        str(event.get("trial")): (str(event["origin"]), str(event.get("of") or ""))
        for event in events
        if event["event"] in ("trial_started", "trial_finished") and "origin" in event
    }


def _trial_row(
    trial: TrialState, search: SearchState, origin: tuple[str, str], stop_requested: bool, running: bool, now: float
) -> TrialRow:
    state: str = trial.status
    if state in ("running", "pending") and not (running and trial.status == "running"):
        state = "stopped" if stop_requested else "pending"  # a resumed search skips trials with a stop request
    elif state == "running" and stop_requested:
        state = "stopping"
    stage = _metric_stage(trial, search.metric) or trial.current
    done, total, unit = _progress(stage)
    value = last_value(trial, search.value_name)
    seconds = trial.seconds
    if seconds is None and state in ("running", "stopping") and trial.started is not None:
        seconds = max(0.0, now - trial.started)
    return TrialRow(
        trial.name,
        state,
        value,
        done,
        total,
        unit,
        seconds,
        trial.overrides,
        *origin,
        error=trial.error,
        best=trial is search.best,
    )


def _metric_stage(trial: TrialState, metric: str) -> StageState | None:
    """Return the training that the metric evaluates: `sft` for `sft.eval_loss` and for `eval.sft.heldout.loss`."""
    started = {name: stage for name, stage in trial.stages.items() if stage.status != "pending"}
    return next((started[name] for name in metric.split(".") if name in started and started[name].points), None)


def _progress(stage: StageState | None) -> tuple[float, float, str]:
    if stage is None:
        return 0, 0, ""
    steps = as_number(stage.facts.get("steps"))  # a cached stage logs no progress
    return (steps, steps, "steps") if steps is not None and not stage.total else (stage.done, stage.total, stage.unit)


def last_value(trial: TrialState, metric: str) -> float | None:
    """Return the final value of the search's objective, or the last intermediate value of `metric`. A weighted sum has
    no intermediate value."""
    if trial.value is not None:
        return trial.value
    stage, _, name = metric.partition(".")
    points = trial.stages[stage].curve if stage in trial.stages else []
    values = [point.values[name] for point in points if name in point.values]
    return values[-1] if values else None


def _header_lines(trials: Trials) -> list[Text]:
    ended = sum(trial.state not in OPEN for trial in trials.trials)
    first = Text(trials.run, style="bold")
    first.append(f"  {trials.metric} ({trials.mode})" if trials.metric else "", style="not bold dim")
    if trials.planned:
        first.append(f"  {ended} of {max(trials.planned, len(trials.trials))} trials ended", style="not bold")
    return [first, Text(_search_status(trials), style="dim")]


def _search_status(trials: Trials) -> str:
    command = f"`tunery run {trials.file}`"
    match trials.search_state:
        case "running":
            return f"the search is running ({trials.owner})"
        case "ended":
            return "the search has ended"
        case "interrupted":
            return f"the search is not running: {command} resumes it"
    return (
        f"the search has not started: {trials.owner} is running the stages before it"
        if trials.owner
        else f"the search has not started, and the run is not running: {command} starts it"
    )


def _table(trials: Sequence[TrialRow], width: int) -> list[RenderableType]:
    """One line per trial. On narrow terminals its values are on a line below it."""
    if not trials:
        return []
    names = short_paths(path for trial in trials for path in trial.overrides)
    cells = [_cells(trial) for trial in trials]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    origins = [_origin(trial) for trial in trials]
    wide, origin_width = width >= WIDE, max(map(len, ["origin", *origins]))
    lines: list[RenderableType] = [Text("")]
    header = _row(COLUMNS, widths) + (f"  {'origin':<{origin_width}}  values" if wide else "")
    lines.append(Text("  " + header, style="dim", no_wrap=True))
    for trial, row, origin in zip(trials, cells, origins, strict=True):
        style = STYLES.get(trial.state, "yellow")
        line = Text(MARKS.get(trial.state, "■") + " ", style=style)
        line.append(_row(row, widths), style="bold default" if trial.best else "default")
        values = overrides_text(trial.overrides, names)
        if wide:
            line.append(f"  {origin:<{origin_width}}  {values}", style="default")
        lines.append(line)
        if not wide:
            lines.append(_indented("  ".join(part for part in (values, origin) if part), "dim"))
        if trial.error:
            lines.append(_indented(_last_line(trial.error), "red"))
    return lines


def _indented(text: str, style: str) -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, 4), expand=False)


def _cells(trial: TrialRow) -> tuple[str, ...]:
    progress = ""
    if trial.total:
        complete = trial.done >= trial.total
        progress = f"{count(trial.total) if complete else f'{count(trial.done)}/{count(trial.total)}'} {trial.unit}"
    return (
        trial.name,
        trial.state + (", best" if trial.best else ""),
        measure(trial.value) if trial.value is not None else "",
        progress,
        duration(trial.seconds) if trial.seconds is not None else "",
    )


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Left-align the first two columns (text) and right-align the others (numbers)."""
    return "  ".join(
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def _origin(trial: TrialRow) -> str:
    return f"{trial.origin} of {trial.of}" if trial.of else trial.origin


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

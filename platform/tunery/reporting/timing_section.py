"""Where a run's time went, for the report: the overhead around the work, the timeline of the stages."""

from __future__ import annotations

from collections.abc import Mapping

from tunery.events.formatting import as_number, duration, plain
from tunery.events.run_state import RunState
from tunery.reporting.funnel_timeline import Span, timeline_chart
from tunery.reporting.tables import Figure, Table, table

TIMELINE_TRIALS = 40
"""A longer timeline is no picture any more; the table of trials has them all."""


def overhead(state: RunState) -> Table | None:
    """What was waited for besides the work itself."""
    told = state.overhead
    first, between = as_number(told.get("first_step_seconds")), told.get("between_stages_seconds")
    ray = as_number(told.get("ray_start_seconds"))
    ray = state.ray_start_seconds if ray is None else ray
    rows: list[list[object]] = (
        [["from the command to the first training step", duration(first)]] if first is not None else []
    )
    rows += [["Ray's start", duration(ray)]] if ray is not None else []
    gaps = [gap for value in between if (gap := as_number(value)) is not None] if isinstance(between, list) else []
    if gaps:
        rows.append([f"between stages, {len(gaps)} times, longest {duration(max(gaps))}", duration(sum(gaps))])
    launches = told.get("stage_launch_seconds")
    for stage, seconds in launches.items() if isinstance(launches, Mapping) else ():
        number = as_number(seconds)
        rows.append([f"launch of {stage}", duration(number) if number is not None else plain(seconds)])
    for name, seconds in told.items():
        if name not in (
            "first_step_seconds",
            "between_stages_seconds",
            "ray_start_seconds",
            "stage_launch_seconds",
        ):
            rows.append([name.replace("_", " "), plain(seconds, name)])
    return Table(["overhead", "time"], [False, True], table(["", ""], rows).rows) if rows else None


def timeline(state: RunState) -> Figure | None:
    """When each stage and each trial of the last invocation ran."""
    begun, now = state.started, state.last_event or 0.0
    if begun is None:
        return None
    spans = []
    for stage in state.stages.values():
        end = stage.finished or (now if stage.status == "running" else None)
        start = stage.started if stage.started is not None else (end - (stage.seconds or 0.0) if end else None)
        if start is not None and end is not None:
            spans.append(Span(stage.name, max(0.0, start - begun), max(0.0, end - begun), stage.status, stage.status))
    for trial in list(state.search.trials.values())[:TIMELINE_TRIALS] if state.search else ():
        if trial.started is not None and trial.started >= begun:
            end = trial.started + trial.seconds if trial.seconds is not None else now
            spans.append(Span(trial.name, trial.started - begun, end - begun, trial.status, f"trial, {trial.status}"))
    styles: set[str] = {span.style for span in spans}
    order = ["done", "reused", "running", "stopped", "failed"]
    keys = [(f"span-key {style}", style) for style in order if style in styles]
    return Figure("timeline", timeline_chart(spans, state.elapsed(now) or 0.0), keys=keys) if spans else None

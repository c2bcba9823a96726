"""Overhead of a run outside of its stages, from its event log. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tunery.events.event_log import Event


def overhead(events: Iterable[Event]) -> dict[str, Any]:
    """Return the overhead of the last invocation in the log:

    first_step_seconds      from run_started to the first optimizer step of any training, None without one
    ray_start_seconds       for starting or connecting to Ray, None if it was not needed
    between_stages_seconds  from one stage's end to the next one's start, for stages that ran
    stage_launch_seconds    by stage, from its start to its first finished task (a step, a shard of rows)
    """
    run_start, ray_start, first_step = 0.0, None, None
    between: list[float] = []
    launch: dict[str, float] = {}
    started: dict[str, float] = {}
    ended: float | None = None
    for event in events:
        kind, name, when = event["event"], event.get("stage"), event["t"]
        if kind == "run_started":
            run_start, ray_start, first_step, between, launch, started, ended = when, None, None, [], {}, {}, None
        elif kind == "ray_started":
            ray_start = event["seconds"]
        elif kind == "search_started":
            ended = None  # the time until the evaluation of the best trial belongs to the search
        elif event.get("trial") or not name:
            continue
        elif kind == "stage_started":
            if ended is not None:
                between.append(when - ended)
            started[name] = when
        elif kind == "stage_finished" and not event["reused"]:
            ended = when
        elif kind == "progress" and event.get("preparing"):
            continue
        elif kind == "progress" and event.get("done") and name in started and name not in launch:
            launch[name] = when - started[name]
            if event.get("unit") == "steps" and first_step is None:
                first_step = when - run_start
    return {
        "first_step_seconds": first_step,
        "ray_start_seconds": ray_start,
        "between_stages_seconds": between,
        "stage_launch_seconds": launch,
    }

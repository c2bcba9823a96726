"""The remaining time is estimated only from steady progress, not from start-up and compilation."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tunery.events.event_log import Event, EventLog, EventReader
from tunery.events.event_reducer import apply
from tunery.events.run_state import RunState, StageState
from tunery.reporting.terminal import PlainLines, Terminal

TOTAL = 1_284
STARTED = {"t": 0.0, "event": "stage_started", "stage": "sft", "kind": "sft", "fingerprint": "f"}


def progress(done: float, at: float, total: float | None = TOTAL, unit: str = "steps") -> Event:
    return {"t": at, "event": "progress", "stage": "sft", "done": done, "total": total, "unit": unit}


def training(first_step: float = 38.0, seconds_a_step: float = 0.23) -> Iterator[Event]:
    """As a worker reports it: nothing while it loads, a first step that takes all of the compilation, then an event
    each half second. It takes five minutes in all."""
    yield progress(0, 4.0, total=None)
    yield progress(1, 4.0 + first_step)
    for done in range(4, TOTAL, 3):
        yield progress(done, 4.0 + first_step + (done - 1) * seconds_a_step)


def estimates(events: Iterable[Event]) -> Iterator[tuple[Event, float | None]]:
    """Each event, and what is then shown as the time left."""
    state = RunState()
    apply(state, STARTED)
    for event in events:
        apply(state, event)
        yield event, state.stages["sft"].time_left(event["t"])


def test_no_time_is_shown_before_it_means_something_and_then_it_is_right() -> None:
    end = [event["t"] for event in training()][-1]
    shown = [(event["t"], left) for event, left in estimates(training()) if left is not None]
    begin = 4.0 + 38.0
    assert begin + 9 < shown[0][0] < begin + 12
    for at, left in shown:
        assert left == pytest.approx(end - at, abs=2), f"at {at}"


def test_time_of_a_short_training_is_shown_after_a_twentieth_of_it() -> None:
    events = [progress(0, 0, None), *(progress(step, 5 + step * 0.5, total=40) for step in range(1, 41))]
    first = next(event["done"] for event, left in estimates(events) if left is not None)
    assert first == 3


def test_resumed_training_is_measured_from_where_it_resumes() -> None:
    events = [progress(0, 0, None), *(progress(600 + step, 30 + step, total=TOTAL) for step in range(1, 60))]
    shown = [left for _, left in estimates(events) if left is not None]
    assert max(shown) < TOTAL - 600


def test_scoring_waits_for_more_than_the_actors_first_shards() -> None:
    """Actors load a model before their first shard; four of them then end theirs at nearly the same time."""
    ends = [60.0, 60.4, 61.0, 61.1, *itertools.accumulate([1.0] * 100, initial=62.0)]
    events = [progress(0, 0, 105_000, "rows")]
    events += [progress(1_000 * (n + 1), at, 105_000, "rows") for n, at in enumerate(ends)]
    shown = [(event, left) for event, left in estimates(events) if left is not None]
    for event, left in shown:
        assert left == pytest.approx((105_000 - event["done"]) / 1_000, rel=0.6)


def test_slow_steps_are_measured_over_several_of_them() -> None:
    """A policy's step takes minutes: one that is longer than others must not change the estimate by half."""
    times = list(itertools.accumulate([60.0, 120.0, 60.0, 60.0], initial=100.0))
    events = [progress(0, 0, None), *(progress(n + 1, at, total=20) for n, at in enumerate(times))]
    *_, (_, left) = estimates(events)
    assert left == pytest.approx(15 * 80, rel=0.01)


def test_plain_lines_give_no_time_before_it_means_something() -> None:
    state, lines = RunState(), PlainLines(since=0.0)
    said = []
    for event in [STARTED, *training()]:
        apply(state, event)
        said += lines.lines(state, event)
    shown = [" left" in line for line in said]
    assert shown == sorted(shown), "once it means something, it is shown"
    assert not shown[1], said[1]
    assert shown[-1]
    assert "h " not in "".join(said)


def test_search_waits_for_two_trials(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events" / "driver.jsonl")
    terminal = Terminal(Console(file=io.StringIO()), "r", tmp_path, EventReader(tmp_path / "events"))
    log.write("search_started", metric="m", mode="min", trials=8, max_concurrent=2)
    log.write("trial_finished", trial="t0", overrides={}, state="stopped", value=2.0, seconds=40)
    terminal._read()
    search = terminal.state.search
    assert search is not None
    assert search.time_left(0.0) is None
    log.write("trial_finished", trial="t1", overrides={}, state="done", value=2.0, seconds=20)
    terminal._read()
    assert search.time_left(0.0) == pytest.approx(6 * 30 / 2)


def test_stage_without_progress_has_no_speed() -> None:
    stage = StageState("sft", status="running")
    assert stage.time_left(10.0) is None

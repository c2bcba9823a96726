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
    """Progress as a worker reports it: nothing while it loads, a first step that includes compilation, then an event
    every half second. It takes five minutes."""
    yield progress(0, 4.0, total=None)
    yield progress(1, 4.0 + first_step)
    for done in range(4, TOTAL, 3):
        yield progress(done, 4.0 + first_step + (done - 1) * seconds_a_step)


def estimates(events: Iterable[Event]) -> Iterator[tuple[Event, float | None]]:
    """Yield each event with the time left after it."""
    state = RunState()
    apply(state, STARTED)
    for event in events:
        apply(state, event)
        yield event, state.stages["sft"].time_left(event["t"])


def test_time_left_is_hidden_until_reliable_and_then_accurate() -> None:
    end = [event["t"] for event in training()][-1]
    displayed = [(event["t"], left) for event, left in estimates(training()) if left is not None]
    begin = 4.0 + 38.0
    assert begin + 9 < displayed[0][0] < begin + 12
    for at, left in displayed:
        assert left == pytest.approx(end - at, abs=2), f"at {at}"


def test_time_left_of_a_short_training_is_shown_after_a_twentieth() -> None:
    events = [progress(0, 0, None), *(progress(step, 5 + step * 0.5, total=40) for step in range(1, 41))]
    first = next(event["done"] for event, left in estimates(events) if left is not None)
    assert first == 3


def test_speed_of_a_resumed_training_starts_at_its_checkpoint() -> None:
    events = [progress(0, 0, None), *(progress(600 + step, 30 + step, total=TOTAL) for step in range(1, 60))]
    displayed = [left for _, left in estimates(events) if left is not None]
    assert max(displayed) < TOTAL - 600


def test_scoring_estimate_needs_more_than_the_first_shards() -> None:
    """Actors load a model before their first shard; four of them finish it at nearly the same time."""
    ends = [60.0, 60.4, 61.0, 61.1, *itertools.accumulate([1.0] * 100, initial=62.0)]
    events = [progress(0, 0, 105_000, "rows")]
    events += [progress(1_000 * (n + 1), at, 105_000, "rows") for n, at in enumerate(ends)]
    displayed = [(event, left) for event, left in estimates(events) if left is not None]
    for event, left in displayed:
        assert left == pytest.approx((105_000 - event["done"]) / 1_000, rel=0.6)


def test_slow_steps_are_averaged() -> None:
    """A policy's step takes minutes: a single longer step must not change the estimate by half."""
    times = list(itertools.accumulate([60.0, 120.0, 60.0, 60.0], initial=100.0))
    events = [progress(0, 0, None), *(progress(n + 1, at, total=20) for n, at in enumerate(times))]
    *_, (_, left) = estimates(events)
    assert left == pytest.approx(15 * 80, rel=0.01)


def test_plain_lines_omit_unreliable_time_left() -> None:
    state, lines = RunState(), PlainLines(since=0.0)
    printed = []
    for event in [STARTED, *training()]:
        apply(state, event)
        printed += lines.lines(state, event)
    displayed = [" left" in line for line in printed]
    assert displayed == sorted(displayed), "once shown, it is shown in every line"
    assert not displayed[1], printed[1]
    assert displayed[-1]
    assert "h " not in "".join(printed)


def test_search_estimate_needs_two_ended_trials(tmp_path: Path) -> None:
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

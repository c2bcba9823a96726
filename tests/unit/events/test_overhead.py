"""Overhead of a run outside of its stages, from its event log."""

from __future__ import annotations

from sample_run import START, rewarded_events

from tunery.events.overhead import overhead


def at(t: float, event: str, **values: object) -> dict:
    return {"t": t, "event": event, **values}


EVENTS = [
    at(0, "run_started"),
    at(5, "ray_started", seconds=5.0),
    at(5, "stage_started", stage="base"),
    at(25, "progress", stage="base", done=1, unit="steps"),
    at(40, "stage_finished", stage="base", reused=False),
    at(41, "stage_started", stage="eval"),
    at(50, "stage_finished", stage="eval", reused=False),
    at(50, "search_started"),
    at(60, "progress", stage="base", trial="a", done=1, unit="steps"),
    at(90, "stage_started", stage="eval (best trial)"),
    at(99, "stage_finished", stage="eval (best trial)", reused=False),
]


def test_overhead_has_first_step_launches_and_gaps_without_the_search() -> None:
    assert overhead(EVENTS) == {
        "first_step_seconds": 25,
        "ray_start_seconds": 5.0,
        "between_stages_seconds": [1],
        "stage_launch_seconds": {"base": 20},
    }


def test_tokenization_does_not_count_as_a_training_step() -> None:
    begin = next(index for index, event in enumerate(EVENTS) if event["event"] == "stage_started")
    tokenized = at(21, "progress", stage="base", done=300, unit="rows", preparing=True)
    assert overhead([*EVENTS[: begin + 1], tokenized, *EVENTS[begin + 1 :]]) == overhead(EVENTS)


def test_only_the_last_invocation_counts() -> None:
    two_invocations = [*EVENTS, at(200, "run_started"), at(201, "stage_finished", stage="base", reused=True)]
    assert overhead(two_invocations)["first_step_seconds"] is None
    assert overhead(two_invocations)["between_stages_seconds"] == []


def test_first_step_of_a_policy_is_its_first_update() -> None:
    events = rewarded_events()
    (first,) = [e["t"] for e in events if e["event"] == "progress" and e["stage"] == "ppo" and e["done"] == 1]
    assert overhead(events)["first_step_seconds"] == first - events[0]["t"]
    assert first > START

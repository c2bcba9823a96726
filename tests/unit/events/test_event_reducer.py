"""Reducing the event log to the state of a run after the events so far."""

from __future__ import annotations

from typing import Any

import pytest
from sample_run import START, Event, events_until, failed_events, sample_events
from sample_search import FORGETTING, LOSS, searched_events

from tunery.events.event_reducer import RunState, replay
from tunery.events.run_state import ConstraintState, TrialStanding
from tunery.events.stage_summary import note


def event(name: str, at: float = 0.0, **values: Any) -> Event:
    return {"t": START + at, "event": name, **values}


def started(stage: str = "sft", at: float = 0.0, fingerprint: str = "f") -> Event:
    return event("stage_started", at, stage=stage, kind="sft", fingerprint=fingerprint)


def test_resumed_run_keeps_the_later_value_of_each_step() -> None:
    first = [event("metrics", step=step, values={"loss": 9.0}, stage="sft") for step in (10, 20, 30)]
    resumed = [event("metrics", step=step, values={"loss": 5.0}, stage="sft") for step in (20, 30, 40)]
    start = event("run_started", stages=[{"name": "sft", "kind": "sft", "inputs": []}])
    state = replay([start, started(), *first, start, started(), *resumed])
    curve = state.stages["sft"].curve
    assert [(point.step, point.values["loss"]) for point in curve] == [
        (10, 9.0),
        (20, 5.0),
        (30, 5.0),
        (40, 5.0),
    ]


def test_curve_of_an_edited_stage_is_reset() -> None:
    before = [started(fingerprint="old"), event("metrics", step=10, values={"loss": 9.0}, stage="sft")]
    state = replay([*before, started(fingerprint="new")])
    assert state.stages["sft"].curve == []


def test_train_and_eval_loss_of_one_step_are_one_point() -> None:
    events = [event("metrics", step=10, values={key: 1.0}, stage="sft") for key in ("loss", "eval_loss")]
    (point,) = replay([started(), *events]).stages["sft"].curve
    assert set(point.values) == {"loss", "eval_loss"}


def test_new_invocation_resets_stages_to_pending() -> None:
    events = sample_events()
    second = [index for index, e in enumerate(events) if e["event"] == "run_started"][1]
    state = replay(events[: second + 1])
    assert {stage.status for stage in state.stages.values()} == {"pending"}
    assert state.stages["base"].points
    assert state.stages["docs"].facts == {}
    assert (state.invocations, state.status) == (2, "running")


def test_speed_and_time_left_use_recent_progress() -> None:
    slow = [event("progress", at, stage="sft", done=at, total=1_000, unit="steps") for at in range(0, 100, 10)]
    fast = [
        event("progress", 100 + at, stage="sft", done=90 + 10 * at, total=1_000, unit="steps") for at in range(1, 41)
    ]
    stage = replay([started(), *slow, *fast]).stages["sft"]
    assert stage.rate == pytest.approx(10)
    assert stage.eta_seconds == pytest.approx((1_000 - 490) / 10)
    assert stage.time_left(START + 150) == pytest.approx(51 - 10)


def test_restarted_progress_gives_no_negative_speed() -> None:
    events = [event("progress", at, stage="sft", done=done, total=100) for at, done in ((0, 50), (10, 60), (20, 5))]
    assert replay([started(), *events]).stages["sft"].rate is None


def test_finished_stage_ignores_late_progress() -> None:
    finished = event("stage_finished", 9, stage="sft", kind="sft", seconds=9, facts={"loss": 1.5})
    late = event("progress", 8, stage="sft", done=7, total=10, unit="steps")
    stage = replay([started(), finished, late]).stages["sft"]
    assert (stage.status, stage.facts["loss"], stage.done) == ("done", 1.5, 0)


def test_failed_stage_keeps_cause_and_remedy() -> None:
    state = replay(failed_events())
    (failure,) = state.failures
    assert (state.status, state.stages["sft"].status, state.stages["eval"].status) == (
        "failed",
        "failed",
        "pending",
    )
    assert "79.1 GiB" in failure.cause
    assert "micro_batch_size" in failure.remedy


def test_failed_trial_does_not_fail_the_run() -> None:
    state = replay(sample_events())
    assert state.search is not None
    assert state.search.trials["t07"].error == "loss is NaN at step 60"
    assert state.failures == []
    assert state.status == "done"


def test_best_trial_is_the_best_completed_one() -> None:
    def trial(name: str, status: str, value: float | None) -> Event:
        return event("trial_finished", trial=name, overrides={}, state=status, value=value, seconds=1)

    ended = [
        trial("a", "done", 3.0),
        trial("b", "done", 2.0),
        trial("c", "stopped", 1.0),
        trial("d", "failed", None),
    ]
    state = replay([event("search_started", metric="m", mode="min", trials=4), *ended])
    assert state.search is not None
    assert state.search.best is state.search.trials["b"]
    assert [item.name for item in state.search.ranked] == ["b", "a", "c", "d"]
    state.search.mode = "max"
    assert state.search.best is state.search.trials["a"]


def test_resumed_search_keeps_its_finished_trials() -> None:
    start = event("search_started", metric="m", mode="min", trials=3, space={"a.b": "one of 1, 2"})
    done = event("trial_finished", trial="t0", overrides={"a.b": 1}, state="done", value=2.0, seconds=4)
    cut_off = event("trial_started", trial="t1", overrides={"a.b": 2})
    state = replay([start, done, cut_off, event("run_started", stages=[]), start])
    assert state.search is not None
    assert {name: trial.status for name, trial in state.search.trials.items()} == {
        "t0": "done",
        "t1": "pending",
    }


def test_time_left_of_a_search_is_divided_by_concurrency() -> None:
    start = event("search_started", metric="m", mode="min", trials=5, max_concurrent=2)
    done = event("trial_finished", 10, trial="t0", overrides={}, state="done", value=2.0, seconds=10)
    second = event("trial_finished", 10, trial="t2", overrides={}, state="done", value=2.0, seconds=10)
    running = event("trial_started", 10, trial="t1", overrides={})
    state = replay([start, done, second, running])
    assert state.search is not None
    assert state.search.time_left(START + 14) == pytest.approx((6 + 2 * 10) / 2)


def test_trial_curve_is_that_of_the_stage_in_its_metric() -> None:
    state = replay(sample_events())
    assert state.search is not None
    trial = state.search.trials["t00"]
    held_out = [(p.step, p.values["eval_loss"]) for p in trial.stages["sft"].curve if "eval_loss" in p.values]
    assert state.search.curve(trial) == held_out != []


def test_unknown_or_empty_events_are_ignored() -> None:
    kinds = {e["event"] for e in sample_events()}
    state = replay([{"t": 1.0, "event": kind} for kind in [*sorted(kinds), "something_new"]])
    assert isinstance(state, RunState)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_any_prefix_of_a_log_can_be_reduced(fraction: float) -> None:
    state = replay(events_until(fraction))
    assert state.status in ("running", "interrupted")
    assert all(note(stage) is not None for stage in state.stages.values())


def test_note_has_the_main_result_of_each_stage() -> None:
    stages = replay(sample_events()).stages
    assert note(stages["docs"]) == "reused: 4,000 rows, 12 quarantined"
    assert note(stages["clean"]) == "kept 80%: 3,200 of 4,000"
    assert note(stages["sft"]) == "loss 3.060 → eval 3.190, 3,200 rows (14 truncated)"
    assert note(stages["eval"]) == "best sft: loss 3.191 on domain"


def test_note_of_an_unknown_kind_shows_its_first_facts() -> None:
    finished = event(
        "stage_finished", stage="ppo", kind="ppo", seconds=1, facts={"mean_reward": 0.51, "x": [1], "n": 1200}
    )
    assert note(replay([finished]).stages["ppo"]) == "mean reward 0.51, n 1,200"


def test_search_state_has_origins_values_standings_ties_and_pareto_front() -> None:
    search = replay(searched_events(ended_by="the budget is spent")).search
    assert search is not None
    trial, replicate = search.trials["t00"], search.trials["r00"]
    assert (trial.origin, trial.values[LOSS], trial.feasible, trial.tokens) == ("sampled", 3.1, True, 40_000)
    assert (replicate.origin, replicate.of) == ("replicate", "t00")
    assert search.standings.get(trial.name) == TrialStanding(pytest.approx(3.105), 0.0123, 2)
    assert search.standings.get(replicate.name) is None
    assert (search.ties, search.pareto_front, search.ended_by) == (["t01"], ["t00", "t03"], "the budget is spent")
    assert search.objectives == [(LOSS, "min"), (FORGETTING, "min")]
    assert search.constraints == [ConstraintState(FORGETTING, None, 0.1)]


def test_replayed_search_keeps_its_origins() -> None:
    result = [item for item in searched_events() if item["event"] != "trial_started"]
    for item in result:
        if item["event"] == "trial_finished" and item["trial"] == "r00":
            item.update(origin="replicate", of="t00")
    search = replay(result).search
    assert search is not None
    assert search.trials["r00"] not in search.originals
    assert "r00" not in [trial.name for trial in search.ranked]


def test_infeasible_trial_is_best_only_if_no_trial_is_feasible() -> None:
    def trial(name: str, value: float, feasible: bool) -> Event:
        end = {"overrides": {}, "state": "done", "value": value, "feasible": feasible}
        return event("trial_finished", trial=name, **end)

    start = event("search_started", metric="m", mode="min", trials=2)
    infeasible_only = replay([start, trial("broken", 1.0, False)]).search
    both = replay([start, trial("broken", 1.0, False), trial("kept", 2.0, True)]).search
    assert infeasible_only is not None
    assert infeasible_only.best is infeasible_only.trials["broken"]
    assert both is not None
    assert both.best is both.trials["kept"]

"""Runs and rows that W&B receives after an interruption. Does not use wandb."""

from __future__ import annotations

from typing import Any

from sample_run import Event

from tunery.reporting.wandb_files import History, Row, keys_of
from tunery.reporting.wandb_translate import INTERRUPTED, Finish, Log, Open, Summarize, Translator, run_id

STAGE = run_id("quickstart", "sft", "", "f")


def event(name: str, **values: Any) -> Event:
    return {"t": 1.0, "event": name, **values}


def points(first: int, last: int, **more: Any) -> list[Event]:
    return [event("metrics", stage="sft", step=step, values={"loss": 1.0}, **more) for step in range(first, last + 1)]


def training(first: int, last: int, fingerprint: str = "f", **more: Any) -> list[Event]:
    start = event("stage_started", stage="sft", kind="sft", fingerprint=fingerprint, **more)
    return [start, *points(first, last, **more)]


END = event("stage_finished", stage="sft", kind="sft", fingerprint="f", reused=False, seconds=1.0, facts={})
START = event("run_started", run="quickstart", stages=[])


def ids(actions: list[Any]) -> list[str]:
    return [action.id for action in actions if isinstance(action, Open) and action.job_type != "comparison"]


def row(step: int, **values: Any) -> Row:
    return Row(step, keys_of({"step": step, "rows": 4.0 * step, **values}))


def test_resumed_run_gets_its_curve_from_the_first_point_on() -> None:
    translator = Translator("quickstart", {}, {STAGE: None})
    assert translator.before([START, *training(1, 100)]) == []
    actions = translator.translate([START, *training(67, 70)])
    steps = [action.values["step"] for action in actions if isinstance(action, Log)]
    assert steps == [*range(1, 101), *range(67, 71)]


def test_stage_without_an_end_in_the_file_is_sent_again() -> None:
    missing = Translator("quickstart", {}, {STAGE: None}).before([START, *training(1, 3), END])
    assert ids(missing) == [STAGE]
    assert sum(isinstance(action, Log) for action in missing) == 3
    assert isinstance(missing[-2], Summarize)
    assert missing[-1] == Finish(STAGE, 0)


def test_interrupted_file_is_completed() -> None:
    log = [START, *training(1, 3), START, *training(2, 4), END]
    assert ids(Translator("quickstart", {}, {STAGE: INTERRUPTED}).before(log)) == [STAGE]
    assert Translator("quickstart", {}, {STAGE: 0}).before(log) == []


def test_stage_without_a_file_is_sent_again_only_after_a_kill() -> None:
    without_end = [START, *training(1, 3), END]
    assert ids(Translator("quickstart", {}).before(without_end)) == [STAGE]
    assert Translator("quickstart", {}).before([*without_end, event("run_finished", state="done")]) == []


def test_retried_stage_keeps_its_curve() -> None:
    failed = event("stage_failed", stage="sft", kind="sft", message="no memory", cause="", remedy="", log="")
    translator = Translator("quickstart", {}, {STAGE: 1})
    assert translator.before([START, *training(1, 3), failed, event("run_finished", state="failed")]) == []
    actions = translator.translate([START, *training(3, 4)])
    assert [action.values["step"] for action in actions if isinstance(action, Log)] == [1, 2, 3, 3, 4]


def trial(fingerprint: str, first: int, last: int) -> list[Event]:
    start = event("trial_started", trial="t", overrides={"sft.epochs": 1})
    return [START, start, *training(first, last, fingerprint, trial="t")]


def test_trial_of_an_edited_experiment_gets_a_new_run_that_resumes() -> None:
    """A trial is named by its overrides: if another field is edited, the same name gets another curve."""
    translator = Translator("quickstart", {})
    (first,) = ids(translator.translate(trial("f", 1, 3)))
    (edited,) = ids(translator.translate(trial("g", 1, 3)))
    assert edited != first
    resumed = Translator("quickstart", {})
    resumed.before([*trial("f", 1, 3), *trial("g", 1, 3)])
    actions = resumed.translate(trial("g", 3, 5))
    assert ids(actions) == [edited]
    steps = [action.values["sft/step"] for action in actions if isinstance(action, Log)]
    assert steps == [1, 2, 3, 3, 4, 5], "no point of the first curve"


def test_each_metric_of_a_step_is_written_once_with_increasing_steps() -> None:
    history = History([row(0, loss=1.0), row(1, loss=1.0)])
    assert history.add({"step": 1, "rows": 4.0, "loss": 9.0}) is None
    assert history.add({"step": 1, "rows": 4.0, "eval_loss": 9.0}) == (2, {"step": 1, "rows": 4.0, "eval_loss": 9.0})
    assert history.add({"step": 2, "rows": 8.0, "loss": 1.0, "eval_loss": 1.0}) == (
        3, {"step": 2, "rows": 8.0, "loss": 1.0, "eval_loss": 1.0}
    )  # fmt: skip
    assert history.add({"step": 2, "rows": 8.0, "loss": 1.0, "kl": 0.1}) == (4, {"step": 2, "rows": 8.0, "kl": 0.1})


def test_metrics_with_a_slash_belong_to_the_step_of_their_row() -> None:
    history = History()
    for step in (1, 2):
        assert history.add({"step": step, "eval/loss": 1.0}) is not None
        assert history.add({"sft/step": step, "sft/eval/loss": 1.0}) is not None
    assert history.add({"sft/step": 2, "sft/eval/loss": 1.0}) is None


def test_online_rows_are_resumed_from_the_server_count() -> None:
    stored = [row(step, loss=1.0) for step in range(10)]
    behind = History(stored, uploaded=6)  # 4 rows of the file were not uploaded
    written = [behind.add({"step": step, "rows": 4.0 * step, "loss": 1.0}) for step in range(12)]
    assert [item and item[0] for item in written] == [None] * 6 + [*range(6, 12)]
    ahead = History(stored, uploaded=11)  # one uploaded row is not in the file
    written = [ahead.add({"step": step, "rows": 4.0 * step, "loss": 1.0}) for step in range(12)]
    assert [item and item[0] for item in written] == [None] * 11 + [11]

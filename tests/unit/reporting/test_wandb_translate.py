"""Translation of an event log to W&B actions. Does not use wandb."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from sample_run import METRIC, PPO_FACTS, START, Event, failed_events, rewarded_events, sample_events
from sample_search import FORGETTING, LOSS, SHARE, WARMUP, searched_events

from tunery.reporting.wandb_mirror import WandbResult, requested_mode
from tunery.reporting.wandb_translate import (
    INTERRUPTED,
    Finish,
    Log,
    Open,
    Summarize,
    Translator,
    WandbAxis,
    plan,
    run_id,
)
from tunery.reporting.wandb_values import Histogram, WandbTable, flatten, histograms, table

EXPERIMENT = {
    "name": "quickstart",
    "stages": {
        "sft": {"kind": "sft", "learning_rate": "auto", "tuner": {"lora": {"rank": 16}}},
        "clean": {"kind": "select", "keep": {"perplexity": {"keep_fraction": 0.8}}},
    },
}
EXPERIMENT_RUN = run_id("quickstart")


def event(name: str, at: float = 0.0, **values: Any) -> Event:
    return {"t": START + at, "event": name, **values}


def translated(events: list[Event], **more: Any) -> list[Any]:
    run = next((str(e["run"]) for e in events if e.get("run")), "quickstart")
    return list(plan(events, run, EXPERIMENT, **{"log_texts": True, **more}))


def of_type(kind: type, actions: list[Any], id: str | None = None) -> list[Any]:
    return [action for action in actions if isinstance(action, kind) and (id is None or action.id == id)]


def opened(actions: list[Any], name: str) -> Open:
    (actual,) = {action.id: action for action in of_type(Open, actions) if action.name == name}.values()
    assert isinstance(actual, Open)
    return actual


def points(events: list[Event], stage: str, trial: str = "") -> list[dict[str, Any]]:
    prefix = f"{stage}/" if trial else ""
    return [
        {prefix + name: value for name, value in {"step": e["step"], **e["values"]}.items()}
        for e in events
        if e["event"] == "metrics" and (e["stage"], e.get("trial", "")) == (stage, trial)
    ]


def training(stage: str = "sft", **more: Any) -> list[Event]:
    return [
        event("run_started", run="quickstart", stages=[]),
        event("stage_started", 1, stage=stage, kind="sft", fingerprint="f", **more),
        event("metrics", 2, stage=stage, step=1, values={"loss": 2.0}, **more),
    ]


def test_one_run_per_stage_trial_and_experiment() -> None:
    runs = of_type(Open, translated(sample_events()))
    assert Counter(run.job_type for run in runs) == {
        "pretrain": 1, "score": 1, "select": 1, "sft": 2, "evaluate": 1, "trial": 12, "comparison": 1
    }  # fmt: skip
    assert "quickstart/docs" not in {run.name for run in runs}, "docs was reused in the last invocation"


def test_every_run_is_opened_once_and_finished_last() -> None:
    actions = translated(sample_events())
    for run in of_type(Open, actions):
        run_actions = [action for action in actions if action.id == run.id]
        assert run_actions[0] is run
        assert isinstance(run_actions[-1], Finish)
        assert len(of_type(Open, run_actions)) == len(of_type(Finish, run_actions)) == 1


def test_ids_are_deterministic_and_distinct() -> None:
    events = sample_events()
    assert [run.id for run in of_type(Open, translated(events))] == [
        run.id for run in of_type(Open, translated(events))
    ]
    ids = {run_id("a"), run_id("b"), run_id("a", "s"), run_id("a", "s", "t"), run_id("a", "s", "t", "f")}
    assert len(ids) == 5
    assert all(id.isalnum() and len(id) <= 32 for id in ids)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_actions_do_not_depend_on_read_boundaries(size: int) -> None:
    events = sample_events()
    second = [index for index, e in enumerate(events) if e["event"] == "run_started"][1]
    translator = Translator("quickstart", EXPERIMENT, log_texts=True)
    translator.before(events[:second])
    actions: list[Any] = []
    for start in range(second, len(events), size):
        actions += translator.translate(events[start : start + size])
    assert [*actions, *translator.close()] == translated(events)


def test_curve_of_an_interrupted_stage_is_sent_completely() -> None:
    events = sample_events()
    base = opened(translated(events), "quickstart/base")
    assert [log.values for log in of_type(Log, translated(events), base.id)] == points(events, "base")


def test_points_have_step_and_time() -> None:
    events = sample_events()
    actions = translated(events)
    sft = opened(actions, "quickstart/sft")
    assert of_type(WandbAxis, actions, sft.id) == [WandbAxis(sft.id, "")]
    times = [e["t"] for e in events if e["event"] == "metrics" and e["stage"] == "sft" and "trial" not in e]
    assert [log.time for log in of_type(Log, actions, sft.id)] == times


def test_trial_curves_have_the_stage_name() -> None:
    events = sample_events()
    actions = translated(events)
    for name in ("t00", "t07"):
        trial = opened(actions, name)
        assert of_type(WandbAxis, actions, trial.id) == [WandbAxis(trial.id, "sft/")]
        assert [log.values for log in of_type(Log, actions, trial.id)] == points(events, "sft", name)


def test_trial_has_overrides_metric_and_outcome() -> None:
    events = sample_events()
    actions = translated(events)
    ends = {e["trial"]: e for e in events if e["event"] == "trial_finished"}
    for name, end in ends.items():
        trial = opened(actions, name)
        assert trial.config == end["overrides"]
        summary = {
            key: value for action in of_type(Summarize, actions, trial.id) for key, value in action.values.items()
        }
        assert summary["state"] == end["state"]
        assert summary.get(METRIC) == end["value"]
        assert of_type(Finish, actions, trial.id) == [Finish(trial.id, 1 if end["state"] == "failed" else 0)]


def test_replayed_search_opens_no_trials_but_has_its_table() -> None:
    trial = event("trial_finished", 2, trial="t1", overrides={"sft.epochs": 2}, state="done", value=1.5, seconds=3.0)
    space = {"sft.epochs": "one of 1, 2"}
    search = event("search_started", 1, metric=METRIC, mode="min", trials=1, space=space)
    actions = translated([event("run_started", stages=[]), search, trial])
    assert [run.job_type for run in of_type(Open, actions)] == ["comparison"]
    (log,) = of_type(Log, actions)
    (row,) = log.values["leaderboard"].rows
    cells = dict(zip(log.values["leaderboard"].columns, row, strict=True))
    assert [cells[name] for name in ("trial", "state", METRIC, "sft.epochs", "seconds")] == ["t1", "done", 1.5, 2, 3.0]


def test_stage_built_by_another_run_has_no_run() -> None:
    events = [
        event("run_started", stages=[]),
        event("stage_started", stage="docs", kind="dataset", fingerprint="f"),
        event("progress", stage="docs", done=0, total=None, unit="", detail="waiting: host:1 builds it"),
        event("stage_finished", stage="docs", kind="dataset", fingerprint="f", reused=True, facts={}),
    ]
    assert [run.name for run in of_type(Open, translated(events))] == ["quickstart"]


def test_curve_of_a_reused_stage_is_not_sent_again() -> None:
    translator = Translator("quickstart", EXPERIMENT)
    point = event("metrics", stage="base", step=1, values={"loss": 1.0})
    end = event("stage_finished", stage="base", kind="pretrain", fingerprint="f", reused=True, facts={})
    actions = translator.translate([event("run_started", stages=[]), point, end])
    assert [run.name for run in of_type(Open, actions)] == ["quickstart"]
    assert translator.late == 0


def test_point_after_the_end_of_its_stage_is_counted() -> None:
    translator = Translator("quickstart", EXPERIMENT)
    end = event("stage_finished", 3, stage="sft", kind="sft", fingerprint="f", reused=False, facts={})
    late = event("metrics", 4, stage="sft", step=2, values={"loss": 1.0})
    actions = translator.translate([*training(), end, late])
    assert len(of_type(Log, actions)) == 1
    assert translator.late == 1


def test_failed_stage_ends_with_its_error() -> None:
    actions = translated(failed_events())
    sft = opened(actions, "quickstart/sft")
    (summary,) = of_type(Summarize, actions, sft.id)
    assert summary.values["error.message"] == "rank 1 ran out of GPU memory at step 40"
    assert summary.values["error.remedy"] == "set compute.micro_batch_size to 32 or to auto"
    assert of_type(Finish, actions) [-2:] == [Finish(sft.id, 1), Finish(EXPERIMENT_RUN, 1)]  # fmt: skip


def test_open_runs_are_marked_as_interrupted() -> None:
    finished = of_type(Finish, translated(training()))
    assert [(action.id == EXPERIMENT_RUN, action.exit_code) for action in finished] == [
        (False, INTERRUPTED),
        (True, INTERRUPTED),
    ]


def test_stage_is_configured_by_its_spec() -> None:
    sft = opened(translated(sample_events()), "quickstart/sft")
    assert sft.config == {**EXPERIMENT["stages"]["sft"], "stage": "sft", "fingerprint": "f-sft"}  # type: ignore[index]


def test_stage_of_the_best_trial_is_configured_by_its_values() -> None:
    overrides = {"sft.tuner.lora.rank": 4, "clean.keep.perplexity.keep_fraction": 0.5}
    best = [
        event("trial_finished", 1, trial="t1", overrides=overrides, state="done", value=1.0, seconds=1.0),
        event("search_finished", 2, best="t1", best_overrides=overrides, value=1.0, seconds=1.0),
    ]
    start, *rest = training("sft (best trial)")
    sft = opened(translated([start, *best, *rest]), "quickstart/sft (best trial)")
    assert sft.config["tuner"] == {"lora": {"rank": 4}}
    assert EXPERIMENT["stages"]["sft"]["tuner"] == {"lora": {"rank": 16}}, "the experiment is not modified"  # type: ignore[index]


def test_run_summary_has_the_tables_and_their_numbers() -> None:
    events = sample_events()
    actions = translated(events)
    comparison = next(e for e in events if e["event"] == "comparison")
    (log,) = of_type(Log, actions, EXPERIMENT_RUN)
    assert log.values["result"] == WandbTable(comparison["columns"], comparison["rows"])
    assert len(log.values["leaderboard"].rows) == 12
    counts = next(
        e["facts"]["scores"]["perplexity"]["histogram"]["counts"]
        for e in events
        if e.get("stage") == "scored" and "facts" in e
    )
    assert log.values["scored.scores.perplexity.histogram"].counts == counts
    (summary,) = of_type(Summarize, actions, EXPERIMENT_RUN)
    assert summary.values["result.sft.domain loss"] == 3.191
    assert summary.values["clean.kept"] == 3_200
    assert summary.values["docs.rows"] == 4_000, "facts of reused stages are included"
    assert summary.values["eval.sft.domain.loss"] == 3.191, "the name that a search uses"
    assert summary.values["search.trials.failed"] == 1


def test_responses_are_a_table_and_not_summary_values() -> None:
    actions = translated(rewarded_events())
    ppo, wins, experiment_run = (opened(actions, f"rewarded{name}") for name in ("/ppo", "/wins", ""))
    *_, responses = of_type(Log, actions, ppo.id)
    assert list(responses.values) == ["responses"]
    responses_table = responses.values["responses"]
    assert responses_table.columns == ["prompt", "before", "after", "reward before", "reward after"]
    assert [row[0] for row in responses_table.rows] == [entry["prompt"] for entry in PPO_FACTS["responses"]]
    (model_responses,) = of_type(Log, actions, wins.id)
    assert model_responses.values["responses"].columns[:4] == ["prompt", "base", "ppo", "grpo"]
    for run in (ppo, wins, experiment_run):
        (summary,) = of_type(Summarize, actions, run.id)
        assert not any("responses" in name.split(".") for name in summary.values)


def test_policy_curves_are_complete_with_speed_by_phase() -> None:
    events = rewarded_events()
    actions = translated(events)
    for name in ("ppo", "grpo"):
        stage = opened(actions, f"rewarded/{name}")
        curve = [log.values for log in of_type(Log, actions, stage.id) if "responses" not in log.values]
        assert curve == points(events, name)
    ppo = {key for log in of_type(Log, actions, opened(actions, "rewarded/ppo").id) for key in log.values}
    assert {"rollout_tokens_per_second", "score_tokens_per_second", "update_tokens_per_second", "memory_gb"} <= ppo


def test_rows_of_the_same_name_have_separate_values() -> None:
    row = event("comparison", title="Loss", columns=["model", "loss"], rows=[["a", 1.0], ["a", 2.0]], notes=[])
    (summary,) = of_type(Summarize, translated([event("run_started", stages=[]), row]), EXPERIMENT_RUN)
    assert (summary.values["loss.a.loss"], summary.values["loss.a.1.loss"]) == (1.0, 2.0)


def test_diverged_loss_stays_in_the_curve() -> None:
    nan = event("metrics", 3, stage="sft", step=2, values={"loss": math.nan, "note": "x", "best": None})
    last = of_type(Log, translated([*training(), nan]))[-1]
    assert set(last.values) == {"step", "loss"}
    assert math.isnan(last.values["loss"])


def test_empty_log_has_no_actions() -> None:
    assert translated([]) == []


def test_facts_become_flat_names() -> None:
    facts = {
        "loss": math.nan,
        "best": -math.inf,
        "done": True,
        "none": None,
        "nested": {"rate": {"value": 1e-3, "rule": "reason"}},
        "results": [{"model": "sft", "set": "domain", "loss": 2.0}, {"model": "sft", "set": "general", "loss": 3.0}],
        "rules": [{"score": "perplexity", "rule": "keep_fraction 0.8", "dropped": 8}],
        "injected_corruption": {"": 3, "cut": 1},
        "unnamed": [{"x": 1}, {"x": 2}],
        "twice": [{"name": "a", "x": 1}, {"name": "a", "x": 2}],
        "short": [1, math.inf],
        "long": list(range(1_000)),
        "odd": [1, {"x": 2}],
        "histogram": {"edges": [0, 1], "counts": [2]},
    }
    flat = flatten(facts)
    assert flat == {
        "loss": "NaN",
        "best": "-Infinity",
        "done": True,
        "nested.rate.value": 1e-3,
        "nested.rate.rule": "reason",
        "sft.domain.loss": 2.0,
        "sft.general.loss": 3.0,
        "rules.perplexity.rule": "keep_fraction 0.8",
        "rules.perplexity.dropped": 8,
        "injected_corruption.none": 3,
        "injected_corruption.cut": 1,
        "unnamed.0.x": 1,
        "unnamed.1.x": 2,
        "twice.a.x": 1,
        "twice.a.1.x": 2,
        "short": [1, "Infinity"],
        "long.count": 1_000,
        "odd": '[1, {"x": 2}]',
    }
    assert flat["done"] is True
    json.dumps(flat, allow_nan=False)


def test_histograms_are_found_at_any_depth_and_empty_ones_skipped() -> None:
    full = {"edges": [1.0, 2.0, 3.0], "counts": [4, 5], "corrupted": [0, 1]}
    empty = {"edges": [], "counts": [], "corrupted": []}
    actual = histograms({"scores": {"perplexity": {"histogram": full}, "other": {"histogram": empty}}}, "scored.")
    assert actual == {
        "scored.scores.perplexity.histogram": Histogram([1.0, 2.0, 3.0], [4, 5]),
        "scored.scores.perplexity.histogram_corrupted": Histogram([1.0, 2.0, 3.0], [0, 1]),
    }


def test_rows_of_a_table_are_as_long_as_its_columns() -> None:
    result = table(["a", "b"], [[1], [1, 2, 3], [math.nan, {"x": 1}]])
    assert result.rows == [[1, None], [1, 2], ["NaN", '{"x": 1}']]


@pytest.mark.parametrize(
    ("configured", "environment", "mode"),
    [
        ("auto", {}, "auto"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "Offline"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"WANDB_MODE": "no such mode"}, "offline"),
        ("offline", {"WANDB_MODE": "online"}, "offline"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_wandb_mode_of_the_environment_applies_if_the_file_sets_auto(
    configured: str, environment: dict[str, str], mode: str
) -> None:
    assert requested_mode(configured, environment) == mode


def test_notes_have_the_sync_command_and_missing_records() -> None:
    assert WandbResult("disabled").notes == []
    assert WandbResult("offline", "my runs/wandb", 3).notes == ["W&B (offline): wandb sync 'my runs/wandb'"]
    assert WandbResult("online", "https://wandb.ai/me/p", 3).notes == ["W&B (online): https://wandb.ai/me/p"]
    (_, problem) = WandbResult("offline", "r", 3, lost=2, error="OSError: disk full").notes
    assert problem == "W&B: OSError: disk full (2 records are missing in W&B)"
    assert "--include-online" in WandbResult("offline", "r", 3, partly_online=True).notes[0]


# Searches.


def test_origin_of_unsampled_trials_is_a_tag_and_in_the_config() -> None:
    actions = translated(searched_events())
    sampled, cloned, replicate = (opened(actions, name) for name in ("t00", "t03", "r01"))
    assert (sampled.tags, sampled.config["origin"]) == ((), "sampled")
    assert (cloned.tags, cloned.config["of"]) == (("cloned",), "t00")
    assert replicate.tags == ("replicate",)
    assert (replicate.config["of"], replicate.config["sft.seed"]) == ("t01", 1017)
    assert "of" not in sampled.config


def test_trials_have_distinct_stable_run_ids() -> None:
    def ids() -> list[str]:
        return [run.id for run in of_type(Open, translated(searched_events(98))) if run.job_type == "trial"]

    assert len(set(ids())) == 100
    assert ids() == ids()


def test_resumed_trial_continues_its_run() -> None:
    events = searched_events()
    cut = next(i for i, entry in enumerate(events) if entry["event"] == "trial_finished" and entry["trial"] == "t04")
    actions = translated([*events[:cut], *events[:4], events[cut - 2], *events[cut:]])
    assert opened(actions, "t04").id == opened(translated(events), "t04").id


def test_trial_summary_has_all_metrics_and_feasibility() -> None:
    actions = translated(searched_events())
    summaries = of_type(Summarize, actions, opened(actions, "t00").id)
    values = {key: value for summary in summaries for key, value in summary.values.items()}
    assert (values[LOSS], values[FORGETTING], values["feasible"], values["tokens"]) == (3.1, 0.02, True, 40_000.0)


def rows_of(actions: list[Any], name: str) -> list[dict[str, Any]]:
    (log,) = of_type(Log, actions, run_id("searched"))
    return [dict(zip(log.values[name].columns, row, strict=True)) for row in log.values[name].rows]


def test_leaderboard_in_wandb_has_means_over_seeds_and_no_replicates() -> None:
    rows = rows_of(translated(searched_events()), "leaderboard")
    assert [row["trial"] for row in rows][:2] == ["t00", "t01"]
    assert len(rows) == 16
    assert (rows[0]["mean"], rows[0]["ci_half_width"], rows[0]["seeds"]) == (pytest.approx(3.105), 0.0123, 2)
    assert rows[2]["seeds"] is None
    assert {LOSS, FORGETTING, "sft.learning_rate", "violations", "pareto_front", "origin"} <= rows[0].keys()


def test_parallel_coordinates_and_pareto_front_have_a_row_per_trial() -> None:
    actions = translated(searched_events())
    rows = rows_of(actions, "parallel_coordinates")
    assert len({row["trial"] for row in rows}) == len(rows) == 16
    assert list(rows[0]) == ["trial", "sft.learning_rate", "sft.schedule", WARMUP, SHARE, LOSS, FORGETTING]
    assert [row["trial"] for row in rows_of(actions, "pareto_front")] == ["t00", "t03"]


def test_importance_is_a_table_unless_there_are_too_few_trials() -> None:
    rows = rows_of(translated(searched_events()), "importance")
    first = next(row for row in rows if row["metric"] == LOSS)
    assert (first["field"], first["significant"]) == ("sft.learning_rate", True)
    assert len(rows) == 8
    (log,) = of_type(Log, translated(searched_events(5)), run_id("searched"))
    assert "importance" not in log.values


def test_tables_compare_the_best_and_the_worst_trial() -> None:
    actions = translated(searched_events())
    funnel = rows_of(actions, "funnel")
    assert [(row["which"], row["step"], row["rows"]) for row in funnel if row["which"] == "best"] == [
        ("best", "read", 1000),
        ("best", "kept by clean", 800),
    ]
    worst = next(row["trial"] for row in funnel if row["which"] == "worst")
    assert worst == rows_of(actions, "leaderboard")[-1]["trial"]
    samples = rows_of(actions, "filter_samples")
    assert {(row["which"], row["outcome"]) for row in samples} == {
        (which, outcome) for which in ("best", "worst") for outcome in ("kept", "dropped")
    }
    assert samples[0]["text"] == "<b>row</b> of t00"


def test_unsearched_filter_has_no_samples() -> None:
    events = searched_events()
    for entry in events:
        entry.get("overrides", {}).pop(SHARE, None)
        if entry.get("stage") == "clean":
            entry["fingerprint"] = "f-same"
        if entry["event"] == "search_started":
            entry["space"] = {path: line for path, line in entry["space"].items() if path != SHARE}
    (log,) = of_type(Log, translated(events), run_id("searched"))
    assert "filter_samples" not in log.values


def test_texts_are_logged_only_on_request() -> None:
    def texts(log_texts: bool) -> str:
        return repr(
            [
                translated(events, log_texts=log_texts)
                for events in (searched_events(), rewarded_events(), sample_events())
            ]
        )

    private = ["<b>row</b> of t00", *(entry["prompt"] for entry in PPO_FACTS["responses"]), "'command'"]
    assert all(text in texts(True) for text in private)
    assert not [text for text in private if text in texts(False)]


def test_search_summary_has_winner_ties_and_end_reason() -> None:
    (summary,) = of_type(Summarize, translated(searched_events(ended_by="the budget is spent")), run_id("searched"))
    assert summary.values["search.best.trial"] == "t00"
    assert summary.values["search.best.seeds"] == 2
    assert summary.values["search.ties"] == ["t01"]
    assert summary.values["search.ended_by"] == "the budget is spent"


@pytest.mark.parametrize(("state", "late"), [("stopped", 0), ("done", 1)])
def test_late_step_of_a_stopped_trial_is_not_missing(state: str, late: int) -> None:
    translator = Translator("quickstart", EXPERIMENT)
    trial_started = event("trial_started", 0.5, trial="t", overrides={"sft.epochs": 1})
    end = event("trial_finished", 3, trial="t", overrides={"sft.epochs": 1}, state=state, value=2.0)
    point = event("metrics", 4, stage="sft", step=2, values={"loss": 1.0}, trial="t")
    run_started, *rest = training(trial="t")
    actions = translator.translate([run_started, trial_started, *rest, end, point])
    assert len(of_type(Log, actions)) == 1
    assert translator.late == late

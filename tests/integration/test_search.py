"""A search: trials share what they have in common, a restarted one goes on, and the best is measured."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

from conftest import Bench, facts, wait_for


def searched(experiment: dict) -> None:
    experiment["stages"]["sft"]["epochs"] = 1
    experiment["search"] = {
        "metric": "sft.eval_loss",
        "mode": "min",
        "trials": 4,
        "algorithm": "grid",
        "space": {
            "sft.learning_rate": {"choice": [1e-3, 3e-3]},
            "clean.keep.perplexity.quantile": {"choice": [0.5, 0.8]},
        },
    }


def test_a_killed_search_goes_on_and_shared_stages_run_once(before_sft: Bench) -> None:
    before_sft.write(searched)
    first = before_sft.start()
    done = lambda: [e for e in before_sft.events() if e["event"] == "trial_finished"]  # noqa: E731
    wait_for(lambda: (before_sft.run / "events").is_dir() and done(), process=first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    trained_before = {path.name for path in before_sft.artifacts("sft")}
    assert trained_before
    second = before_sft.tunery("run", str(before_sft.file))
    assert second.returncode == 0, second.stdout + second.stderr
    (search,) = before_sft.artifacts("search")
    trials = facts(search)["trials"]
    assert [trial["state"] for trial in trials] == ["done"] * 4
    assert facts(search)["best"]["value"] == min(trial["value"] for trial in trials)
    made = Counter(
        event["fingerprint"]
        for event in before_sft.events()
        if event["event"] == "stage_finished" and not event["reused"]
    )
    assert max(made.values()) == 1, "something was made twice"
    assert len(before_sft.artifacts("score")) == 1
    assert len(before_sft.artifacts("select")) == 2
    assert len(before_sft.artifacts("sft")) == 4
    table = next(event for event in before_sft.events() if event.get("title", "").startswith("Held-out loss"))
    assert any("best trial" in str(row[0]) for row in table["rows"])
    third = before_sft.tunery("run", str(before_sft.file), "--json")
    assert json.loads(third.stdout)["run"] == "small"
    assert third.stderr == ""


def test_trials_on_several_workers_each_and_a_metric_of_an_evaluate_stage(before_sft: Bench) -> None:
    def change(experiment: dict) -> None:
        searched(experiment)
        experiment["search"] |= {"metric": "eval.sft.validation.loss", "trials": 2, "algorithm": "random"}
        experiment["search"]["space"] = {"sft.learning_rate": {"choice": [5e-4]}}
        experiment["stages"]["sft"]["epochs"] = 0.5
        experiment["compute"] |= {"workers_per_trial": 2, "zero_stage": 3}

    before_sft.write(change)
    done = before_sft.tunery("run", str(before_sft.file))
    assert done.returncode == 0, done.stdout + done.stderr
    (search,) = before_sft.artifacts("search")
    (trial,) = facts(search)["trials"]  # the same values drawn twice are one trial
    assert trial["state"] == "done"
    results = [result for path in before_sft.artifacts("evaluate") for result in facts(path)["results"]]
    assert trial["value"] in {result["loss"] for result in results}


def test_trials_are_stopped_and_added_from_another_terminal(before_sft: Bench) -> None:
    def change(experiment: dict) -> None:
        searched(experiment)
        experiment["stages"]["sft"] |= {"epochs": 0.25, "evaluations": 10}
        experiment["search"] |= {"trials": 2, "algorithm": "random", "scheduler": "asha"}
        rates = {"loguniform": [1e-3, 3e-3]}
        experiment["search"]["space"] = {"sft.learning_rate": rates, "sft.epochs": {"choice": [10]}}

    def measured() -> list[dict]:
        return [event for event in before_sft.events() if event.get("trial") and "eval_loss" in event.get("values", {})]

    before_sft.write(change)
    run = before_sft.start()
    wait_for(lambda: (before_sft.run / "events").is_dir() and measured(), 240, process=run)
    unwanted = measured()[0]["trial"]
    for words in (["--stop", unwanted], ["--clone", unwanted, "sft.epochs=0.5"]):
        steered = before_sft.tunery("trials", "small", *words)
        assert steered.returncode == 0, steered.stderr
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, output + errors
    (search,) = before_sft.artifacts("search")
    trials = {trial["trial"]: trial for trial in facts(search)["trials"]}
    assert sorted(trial["origin"] for trial in trials.values()) == ["cloned", "drawn", "drawn"]
    assert trials[unwanted]["state"] == "stopped"
    assert trials[unwanted]["value"] is not None
    (cloned,) = (trial for trial in trials.values() if trial["origin"] == "cloned")
    assert (cloned["state"], cloned["of"], cloned["overrides"]["sft.epochs"]) == ("done", unwanted, 0.5)
    assert not (before_sft.run / "steering").exists()
    listed = json.loads(before_sft.tunery("trials", "small", "--json").stdout)
    assert {trial["name"]: trial["state"] for trial in listed["trials"]} == {
        name: trial["state"] for name, trial in trials.items()
    }

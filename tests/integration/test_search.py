"""Searches: trials share common stages, an interrupted search resumes, and the best trial is evaluated."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from run_here import RunsHere
from workspace import Workspace, facts, wait_for


def searched(experiment: dict) -> None:
    experiment["stages"]["sft"]["epochs"] = 1
    experiment["search"] = {
        "metric": "sft.eval_loss",
        "mode": "min",
        "trials": 4,
        "algorithm": "grid",
        "space": {
            "sft.learning_rate": {"choice": [1e-3, 3e-3]},
            "clean.keep.perplexity.keep_fraction": {"choice": [0.5, 0.8]},
        },
    }


def test_killed_search_resumes_and_shared_stages_run_once(before_sft: Workspace, runs_here: RunsHere) -> None:
    before_sft.write(searched)
    first = before_sft.start()
    done = lambda: [e for e in before_sft.events() if e["event"] == "trial_finished"]  # noqa: E731
    wait_for(lambda: (before_sft.run / "events").is_dir() and done(), process=first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    trained_before = {path.name for path in before_sft.artifacts("sft")}
    assert trained_before
    second = runs_here.tunery(before_sft, "run", str(before_sft.file))
    assert second.returncode == 0, second.stdout + second.stderr
    (search,) = before_sft.artifacts("search")
    trials = facts(search)["trials"]
    assert [trial["state"] for trial in trials] == ["done"] * 4
    assert facts(search)["best"]["value"] == min(trial["value"] for trial in trials)
    built = Counter(
        event["fingerprint"]
        for event in before_sft.events()
        if event["event"] == "stage_finished" and not event["reused"]
    )
    assert max(built.values()) == 1, "an artifact was built twice"
    assert len(before_sft.artifacts("score")) == 1
    assert len(before_sft.artifacts("select")) == 2
    assert len(before_sft.artifacts("sft")) == 4
    table = next(event for event in before_sft.events() if event.get("title", "").startswith("Held-out loss"))
    assert any("best trial" in str(row[0]) for row in table["rows"])
    third = runs_here.tunery(before_sft, "run", str(before_sft.file), "--json")
    assert json.loads(third.stdout)["run"] == "small"
    assert third.stderr == ""


def test_trials_on_several_workers_each_and_a_metric_of_an_evaluate_stage(before_sft: Workspace) -> None:
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
    (trial,) = facts(search)["trials"]  # trials with the same values are one trial
    assert trial["state"] == "done"
    results = [result for path in before_sft.artifacts("evaluate") for result in facts(path)["results"]]
    assert trial["value"] in {result["loss"] for result in results}


def packed(experiment: dict) -> None:
    """Change the experiment to a search of six LoRA trials with two different training sets."""
    experiment["stages"]["sft"] |= {"tuner": {"lora": {"rank": 4}}, "epochs": 1}
    experiment["stages"].pop("eval")
    experiment["compute"] |= {"save_steps": 5, "max_packed_trials": 3}
    experiment["search"] = {
        "metric": "sft.eval_loss",
        "mode": "min",
        "trials": 6,
        "algorithm": "grid",
        "space": {
            "sft.tuner.lora.rank": {"choice": [2, 4, 8]},
            "clean.keep.perplexity.keep_fraction": {"choice": [0.5, 0.8]},
        },
    }


def outcome(bench: Workspace) -> dict[str, dict]:
    (search,) = bench.artifacts("search")
    return {trial["trial"]: trial for trial in facts(search)["trials"]}


def test_killed_packed_search_ends_like_an_undisturbed_one(
    before_sft: Workspace, runs_here: RunsHere, tmp_path: Path
) -> None:
    before_sft.write(packed)
    shutil.copytree(before_sft.store, tmp_path / "undisturbed")
    first = before_sft.start()
    trained = lambda: len([*(before_sft.store / "work").glob("sft-*/checkpoints/*/whole")]) > 2  # noqa: E731
    wait_for(trained, process=first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = runs_here.tunery(before_sft, "run", str(before_sft.file))
    assert second.returncode == 0, second.stdout + second.stderr
    trials = outcome(before_sft)
    assert [trial["state"] for trial in trials.values()] == ["done"] * 6
    measured = [json.loads((path / "runtime_stats.json").read_text()) for path in before_sft.artifacts("sft")]
    assert any(entry["resumed_from"] > 0 for entry in measured), "nothing went on from a checkpoint"
    assert all("packed_with" in entry for entry in measured if entry["workers"] == 1)
    undisturbed = Workspace(tmp_path / "other")
    undisturbed.folder.mkdir()
    undisturbed.write(packed)
    shutil.move(tmp_path / "undisturbed", undisturbed.store)
    whole = runs_here.tunery(undisturbed, "run", str(undisturbed.file), "--json")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for name, trial in outcome(undisturbed).items():
        assert trials[name]["values"] == pytest.approx(trial["values"], rel=1e-5)
    assert len(undisturbed.artifacts("score")) == len(before_sft.artifacts("score")) == 1


def test_failed_trial_is_retried_and_reported_and_the_others_complete(
    before_sft: Workspace, runs_here: RunsHere
) -> None:
    def change(experiment: dict) -> None:
        packed(experiment)
        experiment["search"]["space"] = {"sft.max_length": {"choice": [128, 8]}, "sft.epochs": {"choice": [1, 0.5]}}
        experiment["search"]["trials"] = 4

    before_sft.write(change)
    done = runs_here.tunery(before_sft, "run", str(before_sft.file))
    assert done.returncode == 0, done.stdout + done.stderr
    trials = outcome(before_sft).values()
    assert {(trial["overrides"]["sft.max_length"], trial["state"]) for trial in trials} == {
        (128, "done"),
        (8, "failed"),
    }
    for trial in trials:
        failed = trial["state"] == "failed"
        assert ("gives a training sequence" in trial["error"]) == failed
        started = [event for event in before_sft.events() if event["event"] == "trial_started"]
        assert sum(event["trial"] == trial["trial"] for event in started) == 1 + failed


def test_stopped_trial_frees_its_workers_for_the_pending_one(before_sft: Workspace) -> None:
    """Each trial uses both CPUs, so the next one can start only when they are released."""

    def change(experiment: dict) -> None:
        searched(experiment)
        experiment["stages"]["sft"]["num_evals"] = 8
        experiment["stages"].pop("eval")
        experiment["compute"] |= {"workers_per_trial": 2}
        experiment["search"] = {
            **experiment["search"],
            "algorithm": "random",
            "scheduler": "asha",
            "trials": 3,
            "initial_points": [{"sft.learning_rate": rate} for rate in (1e-3, 0.5, 9e-4)],
            "space": {"sft.learning_rate": {"loguniform": [1e-4, 1.0]}},
        }

    before_sft.write(change)
    done = before_sft.tunery("run", str(before_sft.file))
    assert done.returncode == 0, done.stdout + done.stderr
    states = {trial["overrides"]["sft.learning_rate"]: trial["state"] for trial in outcome(before_sft).values()}
    assert (states[1e-3], states[0.5], len(states)) == ("done", "stopped", 3)


def test_trials_are_stopped_and_added_from_another_terminal(before_sft: Workspace) -> None:
    def change(experiment: dict) -> None:
        searched(experiment)
        experiment["stages"]["sft"] |= {"epochs": 0.25, "num_evals": 10}
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
    assert sorted(trial["origin"] for trial in trials.values()) == ["cloned", "sampled", "sampled"]
    assert trials[unwanted]["state"] == "stopped"
    assert trials[unwanted]["value"] is not None
    (cloned,) = (trial for trial in trials.values() if trial["origin"] == "cloned")
    assert (cloned["state"], cloned["of"], cloned["overrides"]["sft.epochs"]) == ("done", unwanted, 0.5)
    assert not (before_sft.run / "steering").exists()
    listed = json.loads(before_sft.tunery("trials", "small", "--json").stdout)
    assert {trial["name"]: trial["state"] for trial in listed["trials"]} == {
        name: trial["state"] for name, trial in trials.items()
    }

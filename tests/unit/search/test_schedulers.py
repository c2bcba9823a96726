"""Decisions of schedulers on reported metrics, without running Ray Tune."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from tunery.search.journal import Journal, TrialStart
from tunery.search.schedulers import build_scheduler
from tunery.spec import Search


class Trial:
    def __init__(self, name: str, origin: str = "sampled") -> None:
        self.trial_id, self.config = name, {"origin": origin}


def search(scheduler: str) -> Search:
    space = {"sft.epochs": {"choice": [1, 2]}}
    result = {"metric": "sft.eval_loss", "mode": "min", "trials": 9, "scheduler": scheduler, "space": space}
    return Search.model_validate_json(json.dumps(result))


def report(tokens: float, loss: float) -> dict[str, float]:
    return {"sft.eval_loss": loss, "tokens": tokens}


@pytest.mark.parametrize("name", ["asha", "median"])
def test_scheduler_restores_trials_that_ended_before_a_kill(name: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(6):
        journal.begin(TrialStart(f"ended{number}", number, {"sft.epochs": 1}, "sampled"))
        for part in range(1, 10):
            journal.report(f"ended{number}", report(100.0 * part, 1.0))
        journal.end(f"ended{number}", state="done", values={"sft.eval_loss": 1.0}, seconds=1.0, error="")
    scheduler: Any = build_scheduler(search(name), 900.0, journal)
    for trial, loss, decision in (
        (Trial("worse"), 2.0, TrialScheduler.STOP),
        (Trial("better"), 0.5, TrialScheduler.CONTINUE),
    ):
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, report(110.0, loss)) == decision
    replicate = Trial("replicate", "replicate")
    scheduler.on_trial_add(None, replicate)
    assert scheduler.on_trial_result(None, replicate, report(110.0, 2.0)) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_trial_with_a_nan_metric_is_stopped(name: str, tmp_path: Path) -> None:
    scheduler: Any = build_scheduler(search(name), 900.0, Journal(tmp_path / "journal.jsonl"))
    trial = Trial("diverged")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, report(50.0, math.nan)) == TrialScheduler.STOP

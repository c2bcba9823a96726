"""When a training logs, evaluates, saves and reports, and how it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_jobs import training_job

from tunery.errors import StageError, Stopped
from tunery.spec import Sft
from tunery.training.checkpoints import COMPLETE
from tunery.training.job import event_emitter
from tunery.training.loop_control import LoopControl

STEPS = 20


class Loop:
    """A training loop without a model: each step has a loss and each evaluation a metric; checkpoints are empty."""

    def __init__(self, folder: Path, *, steps_per_batch: int = 1, **job_fields: Any) -> None:
        fields = {"kind": "sft", "data": "d", "model": "m", "epochs": 1, "learning_rate": 1e-3, "num_evals": 4}
        folder.mkdir(exist_ok=True)
        job = training_job(folder, Sft.model_validate(fields), folder, **job_fields)
        self.reports: list[dict[str, float]] = []
        self.saved_at: list[int] = []
        self.control = LoopControl(
            job,
            STEPS,
            event_emitter(job, 0),
            has_eval_data=True,
            logging_steps=2,
            save_steps=3,
            signature="one",
            rows_per_step=4,
            tokens_at=lambda step: 100 * step,
            report=self.reports.append,
            steps_per_batch=steps_per_batch,
        )

    def run(self, until: int = STEPS, skipped: int = 0) -> None:
        control = self.control
        for step in range(control.step + 1, until + 1):
            control.end_step(step)
            control.check_step(loss=1 / step, grad_norm=1.0, learning_rate=1e-3, skipped=step == skipped)
            control.raise_if_stopped()
            if control.should_log:
                control.log({"loss": 1 / step, "grad_norm": float("inf")}, {"speed": 5.0})
            if control.should_evaluate:
                control.record_evaluation({"eval_loss": 2 / step})
            if control.should_save:
                self.saved_at.append(step)
                control.checkpoint.mkdir(parents=True)
                control.complete_checkpoint()
            control.flush_reports()

    def logged_at(self, metric: str) -> list[int]:
        return [int(entry["step"]) for entry in self.control.history if metric in entry]


def test_checkpoints_are_saved_at_logged_steps_but_not_at_the_last(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.run()
    assert loop.logged_at("loss") == [1, *range(2, STEPS + 1, 2)]
    assert loop.logged_at("eval_loss") == [5, 10, 15, 20]
    assert loop.saved_at == [4, 8, 12, 16]
    (last,) = (tmp_path / "work" / "checkpoints").iterdir()
    assert last.name == "checkpoint-16", "older ones are removed"
    assert (last / COMPLETE).read_text() == "one"


def test_no_checkpoint_is_saved_within_a_generated_batch_or_after_a_skipped_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path, steps_per_batch=4)
    loop.run(skipped=8)
    assert loop.saved_at == [4, 12, 16]
    assert loop.logged_at("skipped_steps") == [8]


def test_evaluation_of_the_last_step_is_not_reported(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.run()
    assert [(report["steps"], report["rows"], report["tokens"]) for report in loop.reports] == [
        (5, 20, 500),
        (10, 40, 1000),
        (15, 60, 1500),
    ]
    assert loop.reports[0]["tuned.eval_loss"] == pytest.approx(0.4)


def test_history_omits_non_finite_values_and_runtime_metrics(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.run(until=2)
    assert loop.control.history[-1] == {"step": 2.0, "loss": 0.5, "rows": 8.0}


def test_resumed_training_has_the_same_history_and_reports_earlier_evaluations_again(tmp_path: Path) -> None:
    uninterrupted, first = Loop(tmp_path / "a"), Loop(tmp_path / "b")
    uninterrupted.run()
    first.run(until=14)
    second = Loop(tmp_path / "b")
    checkpoint = second.control.resume()
    assert checkpoint is not None
    assert (checkpoint.name, second.control.step, second.control.resumed_from) == ("checkpoint-12", 12, 12)
    second.control.flush_reports()
    second.run()
    assert second.control.history == uninterrupted.control.history
    assert second.reports == uninterrupted.reports


def test_checkpoint_with_another_signature_is_removed(tmp_path: Path) -> None:
    Loop(tmp_path).run(until=5)
    (tmp_path / "work" / "checkpoints" / "checkpoint-4" / COMPLETE).write_text("another")
    assert Loop(tmp_path).control.resume() is None
    assert not (tmp_path / "work" / "checkpoints" / "checkpoint-4").exists()


def test_population_member_keeps_the_checkpoint_of_every_evaluation(tmp_path: Path) -> None:
    checkpoint_dir = tmp_path / "checkpoint_dir"
    checkpoint_dir.mkdir()
    loop = Loop(tmp_path, checkpoint_dir=checkpoint_dir)
    loop.run()
    assert sorted(path.name for path in checkpoint_dir.iterdir()) == ["checkpoint-10", "checkpoint-15", "checkpoint-5"]
    assert {5, 15} <= set(loop.logged_at("loss")), "a checkpoint does not contain the losses since the last log"


def test_stop_file_ends_the_training(tmp_path: Path) -> None:
    stop_file = tmp_path / "stop"
    loop = Loop(tmp_path, stop_file=stop_file)
    loop.run(until=3)
    stop_file.touch()
    loop.control._last_progress = 0.0
    with pytest.raises(Stopped, match="step 4"):
        loop.run()


def test_non_finite_evaluation_ends_the_training(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.run(until=3)
    with pytest.raises(StageError, match="eval loss nan"):
        loop.control.record_evaluation({"eval_loss": float("nan")})

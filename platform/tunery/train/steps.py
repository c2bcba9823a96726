"""Steps of a training: when to evaluate and to save, what is told of each, and which checkpoints count."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunery.errors import Stopped

HISTORY = "history.jsonl"
Report = Callable[[int, dict[str, float]], None]
CURVES = ("loss", "learning_rate", "grad_norm")
"""What is told of a step, with all measures of the evaluations (`eval_..`)."""
GROUPS = ("reward", "kl", "entropy", "clip_fraction", "reward_deviation", "response_length", "cut_off")
MORE_CURVES = {
    "dpo": ("margin", "accuracy"),
    "kto": ("margin", "kl"),
    "grpo": GROUPS,
    "rloo": GROUPS,
}
"""By stage kind, what is told besides; under these names its trainer logs them."""


class Steps(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves at given steps, keeps only whole checkpoints, and reports the curves."""

    def __init__(
        self,
        evaluate_at: list[int],
        save_every: int,
        checkpoints: Path,
        rows_per_step: float,
        total: int,
        emit: Callable[..., None],
        written_by: str,
        report: Report,
        more_curves: Sequence[str] = (),
        iterations: int = 1,
        stop: Path | None = None,
    ) -> None:
        """`iterations`: steps over the same drawn answers. Those are in no checkpoint, so none is saved between."""
        self._curves = {*CURVES, *more_curves}
        self._iterations = iterations
        self._stop = stop
        self.evaluate_at = set(evaluate_at)
        self.save_every = save_every
        self.checkpoints = checkpoints
        self.rows_per_step = rows_per_step
        self.total = total
        self.emit = emit
        self.written_by = written_by
        self.report = report
        self.first_step_at: float | None = None
        self.history: list[dict[str, float]] = []
        """Points of the curves, of earlier tries too."""
        self._last_progress = 0.0
        self._saved_at = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.time()
        if self.first_step_at is None:
            self.first_step_at = now
        if now - self._last_progress > 0.5 or state.global_step == self.total:
            self._last_progress = now
            self.emit("progress", done=state.global_step, total=self.total, unit="steps")
            if self._stop is not None and self._stop.exists():
                raise Stopped(f"stopped at step {state.global_step}")
        control.should_evaluate = state.global_step in self.evaluate_at
        # A loss is logged as the mean since the last log, and that sum is not in a checkpoint: save at steps that are
        # logged, so that a resumed run logs the same points, however often checkpoints are written.
        due = state.global_step - self._saved_at >= self.save_every and control.should_log
        if due and state.global_step < self.total and state.global_step % self._iterations == 0:
            control.should_save = True
            self._saved_at = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        told = {name: value for name, value in (logs or {}).items() if name in self._curves or name.startswith("eval_")}
        values = {name: float(value) for name, value in told.items()}
        if not values:
            return
        values["rows"] = float(state.global_step * self.rows_per_step)
        self.history.append({"step": float(state.global_step), **values})
        self.emit("metrics", step=state.global_step, values=values)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.report(state.global_step, dict(metrics or {}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint counts from when all ranks have written their part; then older ones go."""
        dist.barrier()
        if dist.get_rank() == 0:
            lines = "".join(json.dumps(point) + "\n" for point in self.history)
            (self.checkpoints / f"checkpoint-{state.global_step}" / HISTORY).write_text(lines)
            mark_whole(self.checkpoints, state.global_step, self.written_by)


def written_by(workers: int, zero_stage: int, dtype: str) -> str:
    """What a DeepSpeed checkpoint can be loaded by: the same number of workers, ZeRO stage and precision."""
    return f"{workers} workers, ZeRO-{zero_stage}, {dtype}"


def mark_whole(checkpoints: Path, step: int, written_by: str) -> None:
    (checkpoints / f"checkpoint-{step}" / "whole").write_text(written_by)
    for older in checkpoints.glob("checkpoint-*"):
        if int(older.name.split("-")[1]) < step:
            shutil.rmtree(older)


def drop_foreign(checkpoints: Path, written_by: str) -> None:
    """Checkpoints of other settings, and half-written ones: ours may have to be written under their names."""
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / "whole").is_file() or (path / "whole").read_text() != written_by:
            shutil.rmtree(path)


def last_checkpoint(checkpoints: Path, written_by: str) -> Path | None:
    """The newest whole checkpoint that was written by workers like ours; half-written ones are left alone."""
    whole = [
        path
        for path in checkpoints.glob("checkpoint-*")
        if (path / "whole").is_file() and (path / "whole").read_text() == written_by
    ]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)

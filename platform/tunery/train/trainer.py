"""TRL's SFTTrainer with three changes: our data order, an exact evaluation loss, and steps told to the event log."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

HISTORY = "history.jsonl"
Report = Callable[[int, dict[str, float]], None]


class Trainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """The training set comes in the order in which it is to be seen (train/batches.py)."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss in nats per answer token over the whole set.

        transformers averages the means of batches, which weighs tokens by their batch and so changes with the number
        of workers. Here sums and counts of tokens are added over all ranks. Every rank makes the same number of
        forward passes, because under ZeRO-3 each of them gathers weights from all.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        size = self.args.per_device_eval_batch_size
        indices = sorted(range(len(self.eval_dataset)), key=lambda index: -len(self.eval_dataset[index]["input_ids"]))
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        batches += [batches[0]] * (-len(batches) % world)
        real = len(range(0, len(indices), size))
        loader = DataLoader(
            self.eval_dataset, batch_sampler=batches[rank::world], collate_fn=self.data_collator, num_workers=0
        )
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for number, batch in zip(range(rank, len(batches), world), loader, strict=True):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model_wrapped(**inputs, use_cache=False, fused_lm_head=True)
            if number < real:
                totals += torch.stack([-outputs.log_probs.double().sum(), outputs.label_mask.double().sum()])
        dist.all_reduce(totals)
        self.model.train()
        metrics = {"eval_loss": float(totals[0] / totals[1].clamp(min=1))}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The manifest tells more, and a card would be written anew into every checkpoint."""


class Steps(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves at given steps, keeps only whole checkpoints, and reports the curves."""

    def __init__(
        self,
        evaluate_at: list[int],
        save_every: int,
        checkpoints: Path,
        rows_per_step: int,
        total: int,
        emit: Callable[..., None],
        written_by: str,
        report: Report,
    ) -> None:
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
        control.should_evaluate = state.global_step in self.evaluate_at
        # A loss is logged as the mean since the last log, and that sum is not in a checkpoint: save at steps that are
        # logged, so that a resumed run logs the same points, however often checkpoints are written.
        due = state.global_step - self._saved_at >= self.save_every and control.should_log
        if due and state.global_step < self.total:
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
        names = {"loss", "eval_loss", "learning_rate", "grad_norm"}
        values = {name: float(value) for name, value in (logs or {}).items() if name in names}
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

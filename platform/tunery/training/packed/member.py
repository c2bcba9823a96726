"""One training of a pack: where it stands, what it does next, and what is kept of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunery.errors import StageError
from tunery.events.event_log import EventLog
from tunery.models.load import write_base
from tunery.spec import Sft
from tunery.training.batches import at_even_steps, data_order, plan_training
from tunery.training.checkpoints import (
    HISTORY,
    hardlink_copy,
    last_checkpoint,
    mark_complete,
    read_history,
    remove_incompatible,
    step_of,
    write_history,
)
from tunery.training.divergence import DivergenceGuard, check_finite
from tunery.training.job import Job, Report
from tunery.training.packed.weightless_base import adapter_of
from tunery.training.reload_check import PROBED, LanguageProbe, check_saved
from tunery.training.schedule import schedule
from tunery.training.sequences import TrainingSequences, mixture_facts, mixture_of
from tunery.training.training_stats import (
    SKIPPED_STEPS,
    evaluations_of,
    log_period,
    relog_history,
    report_of,
    save_period,
    training_facts,
)

WRITTEN_BY = "a pack"
"""Of its checkpoints: no DeepSpeed engine reads them, but any pack."""
STATE = "state.pt"


@dataclass(frozen=True)
class MemberStep:
    """What a member brings to a step of the pack."""

    rows: list[int]
    """Of its sequences, longest first."""
    learning_rate: float
    weight_decay: float
    number: int
    """From 1."""


class Member:
    """`with_adapter` (packed/outline.py) made `peft_model`. It goes on from its last checkpoint, if there is one."""

    def __init__(
        self,
        job: Job,
        data: TrainingSequences,
        measured: TrainingSequences,
        tokenizer: Any,
        peft_model: Any,
        base_parameters: int,
    ) -> None:
        assert isinstance(job.spec, Sft)
        self.job, self.data, self.measured = job, data, measured
        self.spec: Sft = job.spec
        self._tokenizer, self._peft_model, self._base_parameters = tokenizer, peft_model, base_parameters
        self._log = EventLog(
            job.events / f"{job.trial or 'stage'}-{job.stage}-0.jsonl", stage=job.stage, trial=job.trial
        )
        self.batching = plan_training(job.spec, len(data), 1, "auto")
        self._order = data_order(data.lengths, self.batching.steps, self._size, job.seed, mixture_of(job.spec, data))
        self._course = schedule(job.spec, self.batching.steps)
        self._evaluate_at = set(at_even_steps(self.batching.steps, job.spec.num_evals) if len(measured) else [])
        self._log_every = log_period(self.batching.steps)
        self._save_every = save_period(job.compute, self.batching.steps)
        self.adapter = adapter_of(peft_model)
        self.step = 0
        self.guard = DivergenceGuard(job.stage)
        self.error: StageError | None = None
        """What ended it before its time; the other members go on."""
        self.history: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._last_progress = 0.0
        self._began, self._first_step_at, self._tokens_here = time.time(), 0.0, 0
        self._due: list[dict[str, float]] = []
        """Evaluations that are reported when all that is due with them is done; those of an earlier try again."""
        self.probe = LanguageProbe(job, data.first(PROBED), base_parameters)
        remove_incompatible(self._checkpoints, WRITTEN_BY)
        self.resumed_from = self._saved_at = self._load()

    @property
    def ended(self) -> bool:
        return self.step == self.batching.steps or self.error is not None

    def attempt(self, work: Callable[[], None]) -> None:
        """What fails of one member ends that one alone."""
        if self.error is None:
            try:
                work()
            except StageError as error:
                self.error = error

    def next(self) -> MemberStep:
        start = self.step * self._size
        return MemberStep(
            self._order[start : start + self._size].tolist(),
            self._course.learning_rates[self.step],
            self._course.weight_decays[self.step],
            self.step + 1,
        )

    def took(self, loss: float, norm: float) -> None:
        """A step was taken: `loss` in nats per counted token of its rows, `norm` of its gradients before clipping.
        Raises StageError where the training has diverged."""
        now = time.time()
        self._first_step_at = self._first_step_at or now
        self._tokens_here += int(self.data.lengths[self.next().rows].sum())
        self.step += 1
        rate = self._course.learning_rates[self.step - 1]
        skipped = not math.isfinite(norm)  # by adamw.update
        if self.guard.check_step(self.step, loss=loss, grad_norm=norm, learning_rate=rate, skipped=skipped):
            self._tell({SKIPPED_STEPS: float(self.guard.skipped_steps)})
        self._losses.append(loss)
        if now - self._last_progress > 0.5 or self.ended:
            self._last_progress = now
            self.emit("progress", done=self.step, total=self.batching.steps, unit="steps")
        if self._logs_now:
            mean = sum(self._losses) / len(self._losses)
            self._losses = []
            told = {"loss": mean, "grad_norm": norm, "learning_rate": rate}
            self._tell({name: value for name, value in told.items() if math.isfinite(value)})

    @property
    def evaluates_now(self) -> bool:
        return self.step in self._evaluate_at

    def evaluated(self, loss: float) -> None:
        """`loss`: in nats per counted token of its eval_data. The last one is told with the artifact (search/trial.py):
        a scheduler may stop a trial at any report, and there the model would be lost for nothing. Raises StageError
        where it is not finite."""
        check_finite(
            self.job.stage, self.step, learning_rate=self._course.learning_rates[self.step - 1], eval_loss=loss
        )
        self._tell({"eval_loss": loss})
        if not self.ended:
            self._report_later(self.step, {"eval_loss": loss})

    def _report_later(self, step: int, measured: Mapping[str, float]) -> None:
        rows = step * self._size
        tokens = int(self.data.lengths[self._order[:rows]].sum())
        self._due.append(report_of(self.job.stage, step, self.batching.steps, tokens, rows, measured))

    def report(self, report: Report) -> None:
        due, self._due = self._due, []
        for told in due:
            report(told)

    @property
    def is_saved(self) -> bool:
        """A checkpoint that others may have begun with is not written again."""
        return self.step == self._saved_at

    @property
    def saves_now(self) -> bool:
        """Where a loss was told, so that the mean of a resumed curve's next point is whole."""
        due = self.step - self._saved_at >= self._save_every and self._logs_now
        return ((due and not self.guard.last_was_skipped) or self._keeps_now) and not self.ended

    @property
    def _keeps_now(self) -> bool:
        return self.job.kept is not None and self.evaluates_now

    @property
    def _logs_now(self) -> bool:
        return self.step % self._log_every == 0 or self.step == 1

    def save(self) -> None:
        """A checkpoint, which counts from when it is whole; kept for others where the job says so. The adapter must
        have been read back from the stack."""
        self._check_weights()
        folder = self._checkpoints / f"checkpoint-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        adapter = self.adapter
        state = {"weights": adapter.weights, "first": adapter.first, "second": adapter.second, "losses": self._losses}
        torch.save(state, folder / STATE)
        write_history(folder, self.history)
        mark_complete(self._checkpoints, self.step, WRITTEN_BY)
        if self.job.kept is not None and self._keeps_now:
            hardlink_copy(folder, self.job.kept)
        self._saved_at = self.step

    def _load(self) -> int:
        checkpoint = last_checkpoint(self._checkpoints, WRITTEN_BY)
        if checkpoint is None:
            return 0
        state = torch.load(checkpoint / STATE, weights_only=True)
        for name, own in vars(self.adapter).items():
            for layer, pair in state.get(name, {}).items():
                for matrix, saved in zip(own[layer], pair, strict=True):
                    matrix.copy_(saved)
        self.history = read_history(checkpoint)
        self.guard.resume(self.history)
        if self.job.begins_with is not None and checkpoint.name == self.job.begins_with.name:
            relog_history(self.history, self.emit)
        for step, measured in evaluations_of(self.history):
            self._report_later(step, measured)
        self._losses = list(state["losses"])
        self.step = step_of(checkpoint)
        return self.step

    def finish(self, losses: Sequence[float], measured: dict[str, Any]) -> None:
        """Writes the artifact, the same that the training alone writes. The adapter must have been read back. `losses`:
        of `probe`. Raises StageError where the training has diverged, or where what was saved is not what was
        trained."""
        self.guard.check_end()
        self._check_weights()
        job = self.job
        folder = job.out / "adapter"
        self._peft_model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        write_base(job.out, job.model)
        checked = check_saved(job, 0, measured["dtype"], self._base_parameters, losses, self.probe.saved)
        trainable = sum(matrix.numel() for pair in self.adapter.weights.values() for matrix in pair)
        facts = {
            **self.data.facts(),
            "train_on": self.spec.train_on,
            "truncate": self.spec.truncate,
            "eval_rows": self.measured.stats.rows,
            "tokens": int(self.data.lengths[self._order].sum()),
            **mixture_facts(self.spec, self.data, self._order),
            **training_facts(self.spec, self.batching, self.history, self._base_parameters + trainable, trainable),
        }
        seconds = time.time() - self._began
        told = {
            "train_seconds": seconds,
            "tokens_per_second": self._tokens_here / seconds,
            "first_step_seconds": (self._first_step_at or time.time()) - job.started,
            "resumed_from": self.resumed_from,
            "workers": 1,
            **measured,
            **checked,
        }
        (job.out / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in self.history))
        (job.work / "outcome.json").write_text(json.dumps({"facts": facts, "measured": told}))

    def _check_weights(self) -> None:
        self.guard.check_weights(self.step, self._peft_model.named_parameters())

    def emit(self, event: str, **values: Any) -> None:
        self._log.write(event, **values)

    def _tell(self, values: dict[str, float]) -> None:
        values["rows"] = float(self.step * self._size)
        self.history.append({"step": float(self.step), **values})
        self.emit("metrics", step=self.step, values=values)

    @property
    def _size(self) -> int:
        return self.batching.global_batch_size

    @property
    def _checkpoints(self) -> Path:
        return self.job.work / "checkpoints"


def same_rows(members: Sequence[Member]) -> dict[int, list[Member]]:
    """Members by the rows that they are measured on: those are shown to all at once."""
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(id(member.measured), []).append(member)
    return groups

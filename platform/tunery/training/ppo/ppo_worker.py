"""What every worker of a PPO training runs: models, steps, evaluations, checkpoints; rank 0 writes the artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tunery.errors import Stopped
from tunery.events.event_log import EventLog
from tunery.spec import Ppo
from tunery.training.batches import at_even_steps, data_order, plan_batches
from tunery.training.job import Job, Report, rows_of
from tunery.training.training_stats import evaluations_of, relog_history, report_of, skipped_steps
from tunery.training.worker_setup import pick_dtype, prepare_process

SHOWN = 8
"""Prompts whose answers are shown, before and after."""
CHARACTERS = 600
"""Of a prompt or an answer that is shown."""
LARGEST_MICRO_BATCH = {"cpu": 4, "gpu": 16}
"""Of `auto`: answers that share a forward and a backward pass. On a CPU so few that answers of a minibatch, which stand
by length, are padded little (benchmarks/ppo_beside_trl.py: an update of 4 takes 0.83 of the time of 8); a GPU waits for
Python between kernels rather."""


def train(job: Job, report: Report) -> None:
    """Runs in each worker, all of them together. Writes `out/` (model or adapter), and `work/outcome.json` last."""
    prepare_process(job.compute.device, job.compute.cpus_per_worker)
    import torch.distributed as dist

    run = _Run(job, report)
    try:
        run.resume()
        for step in range(run.trainer.state.step, run.batching.steps):
            if step == 0:
                run.evaluate()
            run.step()
            if step + 1 in run.evaluate_at:
                run.evaluate()
            run.checkpoint()
            run.tell_search()
        run.finish()
        dist.barrier()
    finally:
        # DeepSpeed's hooks would keep the models for ever, and a trial's process trains again.
        run.engine.destroy()


class _Run:
    def __init__(self, job: Job, report: Report) -> None:
        import torch
        import torch.distributed as dist
        from transformers import set_seed

        from tunery.models.generate import eos_token_ids
        from tunery.models.load import load_tokenizer
        from tunery.models.preview import COLUMNS as PREVIEW_COLUMNS
        from tunery.models.preview import stage_preview
        from tunery.training.checkpoints import checkpoint_signature
        from tunery.training.ppo.build import build
        from tunery.training.ppo.engine import frozen_engine, trained_engine
        from tunery.training.ppo.ptx import mixed_rows
        from tunery.training.ppo.trainer import PpoTrainer
        from tunery.training.sequences import PromptSet, read_row_sequences

        spec, compute = job.spec, job.compute
        assert isinstance(spec, Ppo)
        assert spec.epochs != "auto", "resolved by the launcher"
        assert spec.global_batch_size != "auto", "resolved by the launcher"
        self.job, self.spec, self.report = job, spec, report
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.log = EventLog(
            job.events / f"{job.trial or 'stage'}-{job.stage}-{self.rank}.jsonl", stage=job.stage, trial=job.trial
        )
        self.emit("progress", done=0, total=None, unit="steps", detail="loading models and prompts")
        self.dtype = pick_dtype(compute.precision, compute.device)
        set_seed(job.seed)
        self.tokenizer = load_tokenizer(job.model)
        self.emit("preview", **stage_preview(spec, rows_of(job.rows, PREVIEW_COLUMNS), self.tokenizer))
        data, evaluated = read_row_sequences(job, self.tokenizer)
        self.prompts, self.measured = PromptSet(data), PromptSet(evaluated) if job.eval_rows else None
        size = spec.global_batch_size
        micro = None if compute.micro_batch_size == "auto" else compute.micro_batch_size
        if micro is None:
            part = size // spec.minibatches // self.workers
            largest = min(part, LARGEST_MICRO_BATCH[compute.device])
            micro = max(count for count in range(1, largest + 1) if part % count == 0)
        self.batching = plan_batches(len(self.prompts), spec.epochs, size, self.workers, None)
        self.minibatch = plan_batches(1, 1, size // spec.minibatches, self.workers, micro)
        self.order = data_order(self.prompts.lengths, self.batching.steps, size, job.seed)
        self.evaluate_at = set(at_even_steps(self.batching.steps, spec.num_evals)) if self.measured else set()

        device = torch.device("cuda", torch.cuda.current_device()) if compute.device == "gpu" else torch.device("cpu")
        rounded = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        self.models = build(job, self.tokenizer, rounded, device)
        if compute.gradient_checkpointing:
            self.models.trained.checkpoint_gradients()
        end = eos_token_ids(self.models.trained.policy.model, self.tokenizer)
        engine = trained_engine(self.models.trained, spec, compute, self.minibatch, self.dtype)
        self.engine = engine
        self.trainer = PpoTrainer(
            job.stage,
            spec,
            job.seed,
            self.models,
            engine,
            frozen_engine(self.models.reference, compute, self.dtype),
            frozen_engine(self.models.reward, compute, self.dtype),
            self.batching,
            self.minibatch,
            self.prompts,
            mixed_rows(job, self.tokenizer),
            self.tokenizer,
            end,
            compute.zero_stage,
        )
        self.held, self.separate = self.models.held_bytes, self.models.separate_bytes
        self.written_by = checkpoint_signature(self.workers, compute.zero_stage, self.dtype)
        every = compute.save_steps
        self.save_every = max(1, self.batching.steps // 10) if every == "auto" else every
        self.history: list[dict[str, float]] = []
        self.due: dict[str, float] | None = None
        self.before: list[dict[str, Any]] = []
        """Shown answers of the model that training began with."""
        self.after: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.resumed = 0
        self.begun = time.time()
        self.first_step_at: float | None = None

    def emit(self, event: str, **values: Any) -> None:
        if self.rank == 0:
            self.log.write(event, **values)

    def resume(self) -> None:
        """From the newest whole checkpoint of workers like these, if there is one."""
        import torch.distributed as dist

        from tunery.training.checkpoints import last_checkpoint, read_history, remove_incompatible
        from tunery.training.collectives import broadcast_rank0
        from tunery.training.ppo.engine import load_state
        from tunery.training.ppo.trainer import PpoState

        folder = self.job.work / "checkpoints"
        if self.rank == 0:
            remove_incompatible(folder, self.written_by)
        dist.barrier()
        if (found := broadcast_rank0(last_checkpoint(folder, self.written_by))) is None:
            return
        load_state(self.engine, found, self.models.trained.shared)
        told = json.loads((found / "ppo.json").read_text())
        self.trainer.state = PpoState(**told["state"])
        self.before, self.resumed = told["before"], self.trainer.state.step
        self.history = read_history(found)
        self.trainer.guard.resume(self.history)
        if self.job.begins_with is not None and found.name == self.job.begins_with.name:
            relog_history(self.history, self.emit)
        for step, measured in evaluations_of(self.history):
            if step:
                self.report(self._report_of(step, measured))

    def step(self) -> None:
        size, state = self.batching.global_batch_size, self.trainer.state
        told = self.trainer.step(self.order[state.step * size : (state.step + 1) * size].tolist())
        self.first_step_at = self.first_step_at or time.time()
        for phase, seconds in self.trainer.timing.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            self.tokens[phase] = self.tokens.get(phase, 0) + self.trainer.timing.tokens[phase]
        speeds = {
            f"{phase}_tokens_per_second": self.trainer.timing.tokens[phase] / seconds
            for phase, seconds in self.trainer.timing.seconds.items()
        }
        self._tell(told, {**speeds, "memory_gb": _memory(self.job.compute.device) / 1e9})
        self.emit("progress", done=state.step, total=self.batching.steps, unit="steps")

    def evaluate(self) -> None:
        """Rewards of answers to the held-out prompts, each drawn by the same numbers every time."""
        prompts = self.measured or self.prompts
        places = list(range(len(prompts) if self.measured else min(SHOWN, len(prompts))))
        rollouts = self.trainer.draw(prompts, places, "evaluation")
        rated = self.trainer.rate(prompts, rollouts)
        self.after = [
            {
                "prompt": (prompts.row(place)["messages"][-1]["content"] or "")[:CHARACTERS],
                "answer": self.trainer.text(rollouts.answers[place])[:CHARACTERS],
                "reward": float(rated.scores_b[place]),
            }
            for place in range(min(SHOWN, len(places)))
        ]
        step = self.trainer.state.step
        if step == 0:
            self.before = self.after
        if self.measured is None:
            return
        from tunery.training.divergence import check_finite

        told = {
            "eval_reward": float(rated.scores_b.mean()),
            "eval_kl": float(self.trainer.kl(rollouts, rated).mean()),
            "eval_response_length": float(rollouts.mask_bt.sum(dim=1).float().mean()),
            "eval_eos_rate": sum(rollouts.ended) / len(places),
        }
        check_finite(self.job.stage, step, **told)
        self._tell(told, {})
        # A scheduler may stop a trial at any report: at the last one the model would be lost for nothing.
        if 0 < step < self.batching.steps:
            self.due = self._report_of(step, told)

    def _report_of(self, step: int, measured: Mapping[str, float]) -> dict[str, float]:
        answers = step * self.batching.global_batch_size
        # The longest that they may be: how long they were is not known of steps before a resumption.
        tokens = answers * self.spec.max_length
        return report_of(self.job.stage, step, self.batching.steps, tokens, answers, measured)

    def checkpoint(self) -> None:
        import torch.distributed as dist

        from tunery.training.checkpoints import hardlink_copy, mark_complete, write_history
        from tunery.training.ppo.engine import save_state

        step = self.trainer.state.step
        kept = self.job.kept if step in self.evaluate_at else None
        due = step % self.save_every == 0 and not self.trainer.guard.last_was_skipped
        if not (due or kept is not None) or step == self.batching.steps:
            return
        self.check_weights()
        folder = self.job.work / "checkpoints" / f"checkpoint-{step}"
        save_state(self.engine, folder, self.models.trained.shared)
        dist.barrier()
        if self.rank == 0:
            write_history(folder, self.history)
            (folder / "ppo.json").write_text(json.dumps({"state": asdict(self.trainer.state), "before": self.before}))
            mark_complete(self.job.work / "checkpoints", step, self.written_by)
            if kept is not None:
                hardlink_copy(folder, kept)

    def tell_search(self) -> None:
        """Of an evaluation, when its checkpoint is there."""
        from tunery.training.collectives import any_rank

        if self.due is not None:
            due, self.due = self.due, None
            self.report(due)
        if self.job.stop is not None and any_rank(self.job.stop.exists()):
            raise Stopped(f"stopped at step {self.trainer.state.step}")

    def check_weights(self) -> None:
        self.trainer.guard.check_weights(self.trainer.state.step, self.engine.module.named_parameters())

    def finish(self) -> None:
        from tunery.training.ppo.engine import save_policy
        from tunery.training.reload_check import PROBED, LanguageProbe, check_saved

        self.trainer.guard.check_end()
        self.check_weights()
        if not self.after or self.measured is None:
            self.evaluate()
        parameters = sum(
            int(getattr(weight, "ds_numel", weight.numel())) for weight in self.engine.module.policy.parameters()
        )
        probe = LanguageProbe(self.job, self.prompts.sequences.first(PROBED), parameters)
        losses = [self.trainer.loss_of(ids) for ids in probe.sequences]
        save_policy(self.engine.module, self.job, self.tokenizer, self.rank)
        checked = check_saved(self.job, self.rank, self.dtype, parameters, losses, probe.saved)
        if self.rank == 0:
            (self.job.out / "history.jsonl").write_text(_lines(self.history))
            outcome = {"facts": self._facts(), "measured": {**self._measured(), **checked}}
            (self.job.work / "outcome.json").write_text(json.dumps(outcome))

    def _tell(self, told: dict[str, float], measured: dict[str, float]) -> None:
        """`measured` is told, but is no part of the artifact: times are never the same twice."""
        step = self.trainer.state.step
        rows = {"rows": float(step * self.batching.global_batch_size)}
        self.history.append({"step": float(step), **told, **rows})
        self.emit("metrics", step=step, values={**told, **measured, **rows})

    def _facts(self) -> dict[str, Any]:
        steps = [point for point in self.history if "reward" in point]
        evals = [point for point in self.history if "eval_reward" in point]
        last = steps[-5:]
        sizes = [
            (int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in self.engine.module.policy.parameters()
        ]
        return {
            **self.prompts.facts(),
            "eval_rows": self.measured.sequences.stats.rows if self.measured else 0,
            "steps": self.batching.steps,
            "answers": self.batching.steps * self.batching.global_batch_size,
            "epochs": self.spec.epochs,
            "global_batch_size": self.batching.global_batch_size,
            "learning_rate": self.spec.learning_rate,
            "parameters": sum(size for size, _ in sizes),
            "trainable": sum(size for size, learns in sizes if learns),
            "skipped_steps": skipped_steps(self.history),
            "value_init": self.models.value_from,
            "shared_base": self.models.trained.shared,
            **{name: sum(point[name] for point in last) / len(last) for name in ("reward", "kl", "eos_rate")},
            "first_reward": steps[0]["reward"],
            "kl_coefficient": self.trainer.state.kl_coefficient,
            "eval_reward": evals[-1]["eval_reward"] if evals else None,
            "eval_kl": evals[-1]["eval_kl"] if evals else None,
            "eval_reward_before": evals[0]["eval_reward"] if evals else None,
            "responses": [
                {
                    "prompt": old["prompt"],
                    "before": old["answer"],
                    "after": new["answer"],
                    "reward_before": old["reward"],
                    "reward_after": new["reward"],
                }
                for old, new in zip(self.before, self.after, strict=True)
            ],
        }

    def _measured(self) -> dict[str, Any]:
        import torch

        gpu = self.job.compute.device == "gpu"
        return {
            "train_seconds": time.time() - self.begun,
            "seconds_by_phase": self.seconds,
            "tokens_per_second_by_phase": {
                phase: self.tokens[phase] / seconds for phase, seconds in self.seconds.items()
            },
            "first_step_seconds": (self.first_step_at or time.time()) - self.job.started,
            "resumed_from": self.resumed,
            "workers": self.workers,
            "zero_stage": self.job.compute.zero_stage,
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "peak_memory_bytes": _memory(self.job.compute.device),
            "weights_bytes": self.held,
            "weights_bytes_separate": self.separate,
            "micro_batch_size": self.minibatch.micro_batch_size,
        }


def _lines(history: Sequence[dict[str, float]]) -> str:
    return "".join(json.dumps(point) + "\n" for point in history)


def _memory(device: str) -> int:
    """The most that this worker has held, in bytes."""
    if device == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

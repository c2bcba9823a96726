"""The PPO training loop of each worker: models, steps, evaluations, checkpoints; rank 0 writes the artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tunery.errors import Stopped
from tunery.events.event_log import EventLog
from tunery.models.precision import pick_dtype
from tunery.spec import Ppo
from tunery.training.batches import at_even_steps, data_order, plan_batches
from tunery.training.job import Job, Report, rows_of
from tunery.training.training_stats import evaluations_of, relog_history, report_of, skipped_steps
from tunery.workers.process_state import prepare_process

NUM_EXAMPLE_RESPONSES = 8
"""Prompts whose responses before and after training are kept in the artifact's facts."""
MAX_EXAMPLE_CHARS = 600
"""Characters kept of each prompt and response."""
MAX_AUTO_MICRO_BATCH = {"cpu": 4, "gpu": 16}
"""The largest micro batch size that `auto` picks. Small on a CPU, so that responses, sorted by length, need little
padding (benchmarks/ppo_beside_trl.py: an update with 4 takes 0.83 of the time with 8); larger on a GPU, where small
batches are bound by kernel launches."""


def train(job: Job, report: Report) -> None:
    """Train in each worker; all ranks call it. Writes `out/` (model or adapter), then `work/outcome.json`."""
    prepare_process(job.compute.device, job.compute.cpus_per_worker)
    import torch.distributed as dist

    run = PpoRun(job, report)
    try:
        run.resume()
        for step in range(run.trainer.state.step, run.batching.steps):
            if step == 0:
                run.evaluate()
            run.step()
            if step + 1 in run.evaluate_at:
                run.evaluate()
            run.checkpoint()
            run.report_evaluation()
        run.finish()
        dist.barrier()
    finally:
        # DeepSpeed's hooks keep the models alive, and the process of a trial may train another one.
        run.engine.destroy()


class PpoRun:
    """One PPO training in one worker."""

    def __init__(self, job: Job, report: Report) -> None:
        import torch
        import torch.distributed as dist
        from transformers import set_seed

        from tunery.models.generate import eos_token_ids
        from tunery.models.load import load_tokenizer
        from tunery.models.preview import COLUMNS as PREVIEW_COLUMNS
        from tunery.models.preview import stage_preview
        from tunery.training.checkpoints import checkpoint_signature
        from tunery.training.ppo.build import build_models
        from tunery.training.ppo.engine import frozen_engine, trained_engine
        from tunery.training.ppo.ptx import load_ptx_data
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
        data, eval_data = read_row_sequences(job, self.tokenizer)
        self.prompts, self.eval_prompts = PromptSet(data), PromptSet(eval_data) if job.eval_rows else None
        size = spec.global_batch_size
        micro = None if compute.micro_batch_size == "auto" else compute.micro_batch_size
        if micro is None:
            share = size // spec.minibatches // self.workers
            largest = min(share, MAX_AUTO_MICRO_BATCH[compute.device])
            micro = max(count for count in range(1, largest + 1) if share % count == 0)
        self.batching = plan_batches(len(self.prompts), spec.epochs, size, self.workers, None)
        self.minibatch = plan_batches(1, 1, size // spec.minibatches, self.workers, micro)
        self.order = data_order(self.prompts.lengths, self.batching.steps, size, job.seed)
        self.evaluate_at = set(at_even_steps(self.batching.steps, spec.num_evals)) if self.eval_prompts else set()

        device = torch.device("cuda", torch.cuda.current_device()) if compute.device == "gpu" else torch.device("cpu")
        frozen_dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        self.models = build_models(job, self.tokenizer, frozen_dtype, device)
        if compute.gradient_checkpointing:
            self.models.trained.checkpoint_gradients()
        eos_ids = eos_token_ids(self.models.trained.policy.model, self.tokenizer)
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
            load_ptx_data(job, self.tokenizer),
            self.tokenizer,
            eos_ids,
            compute.zero_stage,
        )
        self.weight_bytes = self.models.weight_bytes
        self.unshared_weight_bytes = self.models.unshared_weight_bytes
        self.checkpoint_signature = checkpoint_signature(self.workers, compute.zero_stage, self.dtype)
        save_steps = compute.save_steps
        self.save_steps = max(1, self.batching.steps // 10) if save_steps == "auto" else save_steps
        self.history: list[dict[str, float]] = []
        self.pending_report: dict[str, float] | None = None
        """An evaluation to report once its checkpoint is written."""
        self.before: list[dict[str, Any]] = []
        """Example responses of the initial model."""
        self.after: list[dict[str, Any]] = []
        """Example responses of the latest evaluation."""
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.resumed_from = 0
        self.started_at = time.time()
        self.first_step_at: float | None = None

    def emit(self, event: str, **values: Any) -> None:
        if self.rank == 0:
            self.log.write(event, **values)

    def resume(self) -> None:
        """Resume from the newest complete checkpoint with the same number of workers, ZeRO stage and dtype, if any."""
        import torch.distributed as dist

        from tunery.training.checkpoints import last_checkpoint, read_history, remove_incompatible
        from tunery.training.collectives import broadcast_rank0
        from tunery.training.ppo.engine import load_state
        from tunery.training.ppo.trainer import PpoState

        folder = self.job.work / "checkpoints"
        if self.rank == 0:
            remove_incompatible(folder, self.checkpoint_signature)
        dist.barrier()
        if (checkpoint := broadcast_rank0(last_checkpoint(folder, self.checkpoint_signature))) is None:
            return
        load_state(self.engine, checkpoint, self.models.trained.shared)
        saved = json.loads((checkpoint / "ppo.json").read_text())
        self.trainer.state = PpoState(**saved["state"])
        self.before, self.resumed_from = saved["before"], self.trainer.state.step
        self.history = read_history(checkpoint)
        self.trainer.guard.resume(self.history)
        if self.job.resume_from is not None and checkpoint.name == self.job.resume_from.name:
            relog_history(self.history, self.emit)
        for step, metrics in evaluations_of(self.history):
            if step:
                self.report(self._report_of(step, metrics))

    def step(self) -> None:
        """Run one PPO step and log its metrics."""
        size, state = self.batching.global_batch_size, self.trainer.state
        metrics = self.trainer.step(self.order[state.step * size : (state.step + 1) * size].tolist())
        self.first_step_at = self.first_step_at or time.time()
        for phase, seconds in self.trainer.phase_stats.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            self.tokens[phase] = self.tokens.get(phase, 0) + self.trainer.phase_stats.tokens[phase]
        speeds = {
            f"{phase}_tokens_per_second": self.trainer.phase_stats.tokens[phase] / seconds
            for phase, seconds in self.trainer.phase_stats.seconds.items()
        }
        self._log_metrics(metrics, {**speeds, "memory_gb": _peak_memory_bytes(self.job.compute.device) / 1e9})
        self.emit("progress", done=state.step, total=self.batching.steps, unit="steps")

    def evaluate(self) -> None:
        """Sample responses to the held-out prompts, with the same random numbers each time, and log their rewards."""
        prompts = self.eval_prompts or self.prompts
        indices = list(range(len(prompts) if self.eval_prompts else min(NUM_EXAMPLE_RESPONSES, len(prompts))))
        rollouts = self.trainer.generate_rollouts(prompts, indices, "evaluation")
        scores = self.trainer.score_rollouts(prompts, rollouts)
        self.after = [
            {
                "prompt": (prompts.row(index)["messages"][-1]["content"] or "")[:MAX_EXAMPLE_CHARS],
                "response": self.trainer.decode(rollouts.responses[index])[:MAX_EXAMPLE_CHARS],
                "reward": float(scores.scores_b[index]),
            }
            for index in range(min(NUM_EXAMPLE_RESPONSES, len(indices)))
        ]
        step = self.trainer.state.step
        if step == 0:
            self.before = self.after
        if self.eval_prompts is None:
            return
        from tunery.training.divergence import check_finite

        metrics = {
            "eval_reward": float(scores.scores_b.mean()),
            "eval_kl": float(self.trainer.sequence_kl(rollouts, scores).mean()),
            "eval_response_length": float(rollouts.mask_bt.sum(dim=1).float().mean()),
            "eval_eos_rate": sum(rollouts.ended) / len(indices),
        }
        check_finite(self.job.stage, step, **metrics)
        self._log_metrics(metrics, {})
        # A scheduler may stop a trial at any report: the last step is not reported here, or a finished model could be
        # lost.
        if 0 < step < self.batching.steps:
            self.pending_report = self._report_of(step, metrics)

    def _report_of(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        responses = step * self.batching.global_batch_size
        # An upper bound: the lengths of responses before a resumed step are not known.
        tokens = responses * self.spec.max_length
        return report_of(self.job.stage, step, self.batching.steps, tokens, responses, metrics)

    def checkpoint(self) -> None:
        """Save a checkpoint if one is due at this step."""
        import torch.distributed as dist

        from tunery.training.checkpoints import hardlink_copy, mark_complete, write_history
        from tunery.training.ppo.engine import save_state

        step = self.trainer.state.step
        checkpoint_dir = self.job.checkpoint_dir if step in self.evaluate_at else None
        due = step % self.save_steps == 0 and not self.trainer.guard.last_was_skipped
        if not (due or checkpoint_dir is not None) or step == self.batching.steps:
            return
        self.check_weights()
        folder = self.job.work / "checkpoints" / f"checkpoint-{step}"
        save_state(self.engine, folder, self.models.trained.shared)
        dist.barrier()
        if self.rank == 0:
            write_history(folder, self.history)
            (folder / "ppo.json").write_text(json.dumps({"state": asdict(self.trainer.state), "before": self.before}))
            mark_complete(self.job.work / "checkpoints", step, self.checkpoint_signature)
            if checkpoint_dir is not None:
                hardlink_copy(folder, checkpoint_dir)

    def report_evaluation(self) -> None:
        """Report a pending evaluation to the search, now that its checkpoint is written. Raises Stopped."""
        from tunery.training.collectives import any_rank

        if self.pending_report is not None:
            pending, self.pending_report = self.pending_report, None
            self.report(pending)
        if self.job.stop is not None and any_rank(self.job.stop.exists()):
            raise Stopped(f"stopped at step {self.trainer.state.step}")

    def check_weights(self) -> None:
        """Raise StageError if a trained weight is not finite. Call on all ranks."""
        self.trainer.guard.check_weights(self.trainer.state.step, self.engine.module.named_parameters())

    def finish(self) -> None:
        """Save the policy, check the saved model, and write history and outcome."""
        from tunery.training.ppo.engine import save_policy
        from tunery.training.reload_check import PROBED, LanguageProbe, check_saved

        self.trainer.guard.check_end()
        self.check_weights()
        if not self.after or self.eval_prompts is None:
            self.evaluate()
        parameters = sum(
            int(getattr(weight, "ds_numel", weight.numel())) for weight in self.engine.module.policy.parameters()
        )
        probe = LanguageProbe(self.job, self.prompts.sequences.first(PROBED), parameters)
        losses = [self.trainer.sequence_loss(ids) for ids in probe.sequences]
        save_policy(self.engine.module, self.job, self.tokenizer, self.rank)
        reload_check = check_saved(self.job, self.rank, self.dtype, parameters, losses, probe.saved)
        if self.rank == 0:
            (self.job.out / "history.jsonl").write_text(_json_lines(self.history))
            outcome = {"facts": self._facts(), "runtime_stats": {**self._runtime_stats(), **reload_check}}
            (self.job.work / "outcome.json").write_text(json.dumps(outcome))

    def _log_metrics(self, metrics: dict[str, float], runtime_metrics: dict[str, float]) -> None:
        """Log both; only `metrics` goes into the artifact's history, since speeds differ from run to run."""
        step = self.trainer.state.step
        rows = {"rows": float(step * self.batching.global_batch_size)}
        self.history.append({"step": float(step), **metrics, **rows})
        self.emit("metrics", step=step, values={**metrics, **runtime_metrics, **rows})

    def _facts(self) -> dict[str, Any]:
        steps = [point for point in self.history if "reward" in point]
        evals = [point for point in self.history if "eval_reward" in point]
        last = steps[-5:]
        sizes = [
            (int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in self.engine.module.policy.parameters()
        ]
        return {
            **self.prompts.facts(),
            "eval_rows": self.eval_prompts.sequences.stats.rows if self.eval_prompts else 0,
            "steps": self.batching.steps,
            "num_responses": self.batching.steps * self.batching.global_batch_size,
            "epochs": self.spec.epochs,
            "global_batch_size": self.batching.global_batch_size,
            "learning_rate": self.spec.learning_rate,
            "parameters": sum(size for size, _ in sizes),
            "trainable": sum(size for size, requires_grad in sizes if requires_grad),
            "skipped_steps": skipped_steps(self.history),
            "value_init": self.models.value_init,
            "shared_base": self.models.trained.shared,
            **{name: sum(point[name] for point in last) / len(last) for name in ("reward", "kl", "eos_rate")},
            "first_reward": steps[0]["reward"],
            "kl_coefficient": self.trainer.state.kl_coefficient,
            "eval_reward": evals[-1]["eval_reward"] if evals else None,
            "eval_kl": evals[-1]["eval_kl"] if evals else None,
            "eval_reward_before": evals[0]["eval_reward"] if evals else None,
            "responses": [
                {
                    "prompt": before["prompt"],
                    "before": before["response"],
                    "after": after["response"],
                    "reward_before": before["reward"],
                    "reward_after": after["reward"],
                }
                for before, after in zip(self.before, self.after, strict=True)
            ],
        }

    def _runtime_stats(self) -> dict[str, Any]:
        import torch

        gpu = self.job.compute.device == "gpu"
        return {
            "train_seconds": time.time() - self.started_at,
            "seconds_by_phase": self.seconds,
            "tokens_per_second_by_phase": {
                phase: self.tokens[phase] / seconds for phase, seconds in self.seconds.items()
            },
            "first_step_seconds": (self.first_step_at or time.time()) - self.job.started,
            "resumed_from": self.resumed_from,
            "workers": self.workers,
            "zero_stage": self.job.compute.zero_stage,
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "peak_memory_bytes": _peak_memory_bytes(self.job.compute.device),
            "weights_bytes": self.weight_bytes,
            "weights_bytes_separate": self.unshared_weight_bytes,
            "micro_batch_size": self.minibatch.micro_batch_size,
        }


def _json_lines(history: Sequence[dict[str, float]]) -> str:
    return "".join(json.dumps(point) + "\n" for point in history)


def _peak_memory_bytes(device: str) -> int:
    """Peak memory of this worker in bytes."""
    if device == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

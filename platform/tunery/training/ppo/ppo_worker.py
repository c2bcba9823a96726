"""The training loop of each worker for PPO: models, steps, evaluations and checkpoints. Rank 0 writes the artifact."""

from __future__ import annotations

import json
import time
from typing import Any

from tunery.models.precision import pick_dtype
from tunery.spec import Ppo
from tunery.training.batches import data_order, plan_batches
from tunery.training.job import Job, Report, event_emitter, rows_of
from tunery.training.training_stats import num_elements, peak_memory_bytes, save_steps, skipped_steps
from tunery.workers.process_state import prepare_process

NUM_EXAMPLE_RESPONSES = 8
"""Number of prompts whose responses before and after the training are facts of the artifact."""
MAX_EXAMPLE_CHARS = 600
"""Maximum characters of each prompt and response in the facts."""
MAX_AUTO_MICRO_BATCH = {"cpu": 4, "gpu": 16}
"""The largest micro batch size that `auto` picks. Small on a CPU, so that responses, sorted by length, need little
padding (benchmarks/ppo_beside_trl.py: an update with 4 takes 0.83 of the time with 8); larger on a GPU, where small
batches are bound by kernel launches."""


def train(job: Job, report: Report) -> None:
    """Train in each worker; all ranks call it. Write the model or adapter to `job.out`, then outcome.json to
    `job.staging_dir`.

    Raises StageError if the training diverges, if a sanity check fails, or if the saved model is not the trained one.
    """
    prepare_process(job.compute.device, job.compute.cpus_per_worker)
    import torch.distributed as dist

    run = PpoRun(job, report)
    loop = run.loop
    try:
        run.resume()
        for step in range(loop.step, loop.steps):
            if step == 0:
                run.evaluate()
            run.step()
            if loop.should_evaluate:
                run.evaluate()
            if loop.should_save:
                run.save_checkpoint()
            loop.flush_reports()
            loop.raise_if_stopped()
        run.finish()
        dist.barrier()
    finally:
        # DeepSpeed's hooks keep the models alive, and the process of a trial may train another one.
        run.engine.destroy()


class PpoRun:
    """A PPO training, as one worker sees it."""

    def __init__(self, job: Job, report: Report) -> None:
        import torch
        import torch.distributed as dist
        from transformers import set_seed

        from tunery.models.generate import eos_token_ids
        from tunery.models.load import load_tokenizer
        from tunery.models.preview import COLUMNS as PREVIEW_COLUMNS
        from tunery.models.preview import stage_preview
        from tunery.training.checkpoints import checkpoint_signature
        from tunery.training.loop_control import LoopControl
        from tunery.training.ppo.build import build_models
        from tunery.training.ppo.engine import PpoEngines
        from tunery.training.ppo.ptx import load_ptx_data
        from tunery.training.ppo.trainer import PpoBatches, PpoData, PpoTrainer
        from tunery.training.sequences import PromptSet, read_row_sequences

        spec, compute = job.spec, job.compute
        assert isinstance(spec, Ppo)
        assert spec.epochs != "auto", "resolved before the job starts"
        assert spec.global_batch_size != "auto", "resolved before the job starts"
        self.job, self.spec = job, spec
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        emit = event_emitter(job, self.rank)
        emit("progress", done=0, total=None, unit="steps", detail="loading models and prompts")
        self.dtype = pick_dtype(compute.precision, compute.device)
        set_seed(job.seed)
        self.tokenizer = load_tokenizer(job.model)
        emit("preview", **stage_preview(spec, rows_of(job.data, PREVIEW_COLUMNS), self.tokenizer))
        data, eval_data = read_row_sequences(job, self.tokenizer)
        self.prompts, self.eval_prompts = PromptSet(data), PromptSet(eval_data) if job.eval_data else None
        batch_size = spec.global_batch_size
        minibatch_size = batch_size // spec.minibatches
        micro_batch_size = None if compute.micro_batch_size == "auto" else compute.micro_batch_size
        if micro_batch_size is None:
            worker_batch_size = minibatch_size // self.workers
            largest = min(worker_batch_size, MAX_AUTO_MICRO_BATCH[compute.device])
            micro_batch_size = max(size for size in range(1, largest + 1) if worker_batch_size % size == 0)
        self.batches = PpoBatches(
            plan_batches(len(self.prompts), spec.epochs, batch_size, self.workers, None),
            plan_batches(1, 1, minibatch_size, self.workers, micro_batch_size),
        )
        steps = self.batches.step.steps
        self.order = data_order(self.prompts.lengths, steps, batch_size, job.seed)
        self.loop = LoopControl(
            job,
            steps,
            emit,
            has_eval_data=self.eval_prompts is not None,
            logging_steps=1,
            save_steps=save_steps(compute, steps, min_steps=1),
            signature=checkpoint_signature(self.workers, compute.zero_stage, self.dtype),
            rows_per_step=batch_size,
            # An upper bound: the lengths of responses before a resumed step are not known.
            tokens_at=lambda step: step * batch_size * spec.max_length,
            report=report,
            rank=self.rank,
        )

        device = torch.device("cuda", torch.cuda.current_device()) if compute.device == "gpu" else torch.device("cpu")
        frozen_dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        self.models = build_models(job, self.tokenizer, frozen_dtype, device)
        if compute.gradient_checkpointing:
            self.models.trained.checkpoint_gradients()
        eos_ids = eos_token_ids(self.models.trained.policy.model, self.tokenizer)
        engines = PpoEngines.from_models(self.models, spec, compute, self.batches.minibatch, self.dtype)
        self.engine = engines.trained
        ppo_data = PpoData(self.prompts, load_ptx_data(job, self.tokenizer), self.tokenizer, eos_ids)
        self.trainer = PpoTrainer(job, self.models, engines, self.batches, ppo_data, self.loop.guard)
        self.weight_bytes = self.models.weight_bytes
        self.unshared_weight_bytes = self.models.unshared_weight_bytes
        self.initial_responses: list[dict[str, Any]] = []
        """Example responses of the initial policy."""
        self.latest_responses: list[dict[str, Any]] = []
        """Example responses of the latest evaluation."""
        self.seconds: dict[str, float] = {}
        """Seconds of each phase, over all steps since the start or the last resume."""
        self.tokens: dict[str, int] = {}
        """Tokens of each phase, over the same steps."""
        self.started_at = time.time()

    def resume(self) -> None:
        """Resume from the newest complete checkpoint with the same number of workers, ZeRO stage and dtype, if any."""
        from tunery.training.ppo.engine import load_state
        from tunery.training.ppo.trainer import PpoState

        checkpoint = self.loop.resume()
        self.loop.flush_reports()
        if checkpoint is not None:
            load_state(self.engine, checkpoint, self.models.trained.shared)
            saved = json.loads((checkpoint / "ppo.json").read_text())
            self.trainer.state, self.initial_responses = PpoState.from_json(saved["state"]), saved["before"]

    def step(self) -> None:
        """Run one PPO step and log its metrics."""
        batch_size, state = self.batches.step.global_batch_size, self.trainer.state
        metrics = self.trainer.step(self.order[state.step * batch_size : (state.step + 1) * batch_size].tolist())
        self.loop.end_step(state.step)
        stats = self.trainer.phase_stats
        for phase, seconds in stats.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            self.tokens[phase] = self.tokens.get(phase, 0) + stats.tokens[phase]
        speeds = {
            f"{phase}_tokens_per_second": stats.tokens[phase] / seconds for phase, seconds in stats.seconds.items()
        }
        self.loop.log(metrics, {**speeds, "memory_gb": peak_memory_bytes(self.job.compute.device) / 1e9})

    def evaluate(self) -> None:
        """Sample responses to the evaluation prompts, with the same random numbers each time, and record their metrics.
        Without `eval_data`, sample only the example responses, to the first training prompts."""
        prompts = self.eval_prompts or self.prompts
        indices = list(range(len(prompts) if self.eval_prompts else min(NUM_EXAMPLE_RESPONSES, len(prompts))))
        rollouts = self.trainer.generate_rollouts(prompts, indices, "evaluation")
        scores = self.trainer.score_rollouts(prompts, rollouts)
        self.latest_responses = [
            {
                "prompt": (prompts.row(index)["messages"][-1]["content"] or "")[:MAX_EXAMPLE_CHARS],
                "response": self.trainer.decode(rollouts.responses[index])[:MAX_EXAMPLE_CHARS],
                "reward": float(scores.scores_b[index]),
            }
            for index in range(min(NUM_EXAMPLE_RESPONSES, len(indices)))
        ]
        if self.loop.step == 0:
            self.initial_responses = self.latest_responses
        if self.eval_prompts is None:
            return
        self.loop.record_evaluation(
            {
                "eval_reward": float(scores.scores_b.mean()),
                "eval_kl": float(self.trainer.sequence_kl(rollouts, scores).mean()),
                "eval_response_length": float(rollouts.mask_bt.sum(dim=1).float().mean()),
                "eval_eos_rate": sum(rollouts.ended) / len(indices),
            }
        )

    def save_checkpoint(self) -> None:
        """Write a complete checkpoint. Raises StageError if a weight is not finite."""
        from tunery.training.ppo.engine import save_state

        self.loop.check_weights(self.engine.module.named_parameters())
        save_state(self.engine, self.loop.checkpoint, self.models.trained.shared)
        if self.rank == 0:
            state = {"state": self.trainer.state.as_json(), "before": self.initial_responses}
            (self.loop.checkpoint / "ppo.json").write_text(json.dumps(state))
        self.loop.complete_checkpoint()

    def finish(self) -> None:
        """Save the policy, check the saved model, and write history and outcome."""
        from tunery.training.ppo.engine import save_policy
        from tunery.training.reload_check import NUM_PROBE_CANDIDATES, LanguageProbe, check_saved

        self.loop.check_end(self.engine.module.named_parameters())
        if not self.latest_responses or self.eval_prompts is None:
            self.evaluate()
        num_parameters = sum(map(num_elements, self.engine.module.policy.parameters()))
        probe = LanguageProbe(self.job, self.prompts.sequences.first(NUM_PROBE_CANDIDATES), num_parameters)
        losses = [self.trainer.sequence_loss(ids) for ids in probe.sequences]
        save_policy(self.engine.module, self.job, self.tokenizer, self.rank)
        reload_check = check_saved(self.job, self.rank, self.dtype, num_parameters, losses, probe.saved_outputs)
        if self.rank == 0:
            self.loop.write_outcome(self._facts(), {**self._runtime_stats(), **reload_check})

    def _facts(self) -> dict[str, Any]:
        steps = [entry for entry in self.loop.history if "reward" in entry]
        evals = [entry for entry in self.loop.history if "eval_reward" in entry]
        last_steps = steps[-5:]
        sizes = [(num_elements(weight), weight.requires_grad) for weight in self.engine.module.policy.parameters()]
        return {
            **self.prompts.facts(),
            "eval_rows": self.eval_prompts.sequences.stats.rows if self.eval_prompts else 0,
            "steps": self.loop.steps,
            "num_responses": self.loop.steps * self.batches.step.global_batch_size,
            "epochs": self.spec.epochs,
            "global_batch_size": self.batches.step.global_batch_size,
            "learning_rate": self.spec.learning_rate,
            "parameters": sum(size for size, _ in sizes),
            "trainable": sum(size for size, requires_grad in sizes if requires_grad),
            "skipped_steps": skipped_steps(self.loop.history),
            "value_init": self.models.value_init,
            "shared_base": self.models.trained.shared,
            **{
                name: sum(entry[name] for entry in last_steps) / len(last_steps)
                for name in ("reward", "kl", "eos_rate")
            },
            "first_reward": steps[0]["reward"],
            "kl_coefficient": self.trainer.state.kl_coefficient,
            "eval_reward": evals[-1]["eval_reward"] if evals else None,
            "eval_kl": evals[-1]["eval_kl"] if evals else None,
            "eval_reward_before": evals[0]["eval_reward"] if evals else None,
            "responses": [
                {
                    "prompt": initial["prompt"],
                    "before": initial["response"],
                    "after": latest["response"],
                    "reward_before": initial["reward"],
                    "reward_after": latest["reward"],
                }
                for initial, latest in zip(self.initial_responses, self.latest_responses, strict=True)
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
            "first_step_seconds": (self.loop.first_step_at or time.time()) - self.job.started_at,
            "resumed_from": self.loop.resumed_from,
            "workers": self.workers,
            "zero_stage": self.job.compute.zero_stage,
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "peak_memory_bytes": peak_memory_bytes(self.job.compute.device),
            "weights_bytes": self.weight_bytes,
            "weights_bytes_separate": self.unshared_weight_bytes,
            "micro_batch_size": self.batches.minibatch.micro_batch_size,
        }

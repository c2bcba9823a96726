"""The training loop of each worker for all stage kinds that use a transformers Trainer: load data and model, train,
save the model and check it. PPO has its own loop (ppo/ppo_worker.py), and so do LoRA trials in a pack (packed/).

TrainingCallback sets the learning rate of each step; the values come from schedule.py.

The loss of a step is the mean over its loss tokens in `pretrain` and `sft`, over its pairs or rows in `dpo`, `kto`,
`reward` and `classifier`, and as TRL defines it in `grpo` and `rloo`. The mean is over all ranks and micro batches.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tunery.models.precision import pick_dtype
from tunery.models.preview import COLUMNS, stage_preview
from tunery.spec import TRAINERS
from tunery.spec.plugins import load_object
from tunery.training.batches import Batching, data_order, plan_training
from tunery.training.job import Job, Report, TrainingTask, event_emitter, rows_of
from tunery.training.schedule import build_schedule
from tunery.training.sequences import mixture_facts, mixture_of
from tunery.training.training_stats import logging_steps, num_elements, peak_memory_bytes, save_steps, training_facts


def train(job: Job, report: Report) -> None:
    """Train in each worker; all ranks call it. Write the model or adapter to `job.out`, then outcome.json to
    `job.staging_dir`.

    Raises StageError if the rows are unusable, if the training diverges, or if the saved model is not the trained one.
    """
    from tunery.workers.process_state import prepare_process

    spec, compute = job.spec, job.compute
    prepare_process(compute.device, compute.cpus_per_worker)
    import torch
    import torch.distributed as dist
    from transformers import PrinterCallback, set_seed

    from tunery.training.checkpoints import checkpoint_signature
    from tunery.training.loop_control import LoopControl
    from tunery.training.reload_check import check_saved
    from tunery.training.training_callback import TrainingCallback

    rank, world_size = dist.get_rank(), dist.get_world_size()
    emit = event_emitter(job, rank)
    emit("progress", done=0, total=None, unit="steps", detail="loading model and rows")
    dtype = pick_dtype(compute.precision, compute.device)
    set_seed(job.seed)
    task = _load_task(job, rank)
    lengths = task.examples.lengths
    batching = plan_training(spec, len(lengths), world_size, compute.micro_batch_size)
    # GRPO and RLOO: a row stands for a group of sequences, and several steps train on the same batch.
    rows_per_batch = batching.global_batch_size // spec.sequences_per_row
    rows_per_step = rows_per_batch / spec.steps_per_batch
    mixture = mixture_of(spec, task.examples)
    order = data_order(lengths, batching.steps // spec.steps_per_batch, rows_per_batch, job.seed, mixture)
    cumulative_tokens = np.concatenate([[0], np.cumsum(lengths[order])])
    loop = LoopControl(
        job,
        batching.steps,
        emit,
        has_eval_data=bool(job.eval_data),
        logging_steps=logging_steps(batching.steps),
        save_steps=save_steps(compute, batching.steps),
        signature=checkpoint_signature(world_size, compute.zero_stage, dtype),
        rows_per_step=rows_per_step,
        tokens_at=lambda step: int(cumulative_tokens[round(step * rows_per_step)]),
        report=report,
        rank=rank,
        steps_per_batch=spec.steps_per_batch,
    )
    callback = TrainingCallback(loop, build_schedule(spec, batching.steps), TRAINERS[spec.kind].extra_metrics)
    trainer = task.build_trainer(_training_arguments(job, batching, dtype), order, callback)
    if rank == 0:
        emit("preview", **stage_preview(spec, rows_of(job.data, COLUMNS), trainer.processing_class, trainer.model))
    trainer.remove_callback(PrinterCallback)
    # transformers (5.23) iterates over all parameters for it at each step, and the result is not used here.
    trainer.floating_point_ops = lambda inputs: 0
    callback.attach(trainer)
    checkpoint = loop.resume()
    loop.flush_reports()
    start_time = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    train_seconds = time.time() - start_time
    loop.check_end(trainer.model.named_parameters())
    peak_memory = peak_memory_bytes(compute.device)
    final_metrics = task.final_metrics(trainer)
    num_parameters = sum(map(num_elements, trainer.model.parameters()))
    probe = task.probe(num_parameters)
    trained_outputs = probe.trained_outputs(trainer)
    task.save(trainer)
    reload_check = check_saved(
        job, rank, dtype, num_parameters, trained_outputs, probe.saved_outputs, probe.output_name
    )
    if rank == 0:
        facts = {
            **task.data_stats(),
            **mixture_facts(spec, task.examples, order),
            "tokens": int(cumulative_tokens[-1]),
            **_common_facts(job, batching, trainer, loop.history),
            **final_metrics,
        }
        runtime_stats = {
            "train_seconds": train_seconds,
            "tokens_per_second": facts["tokens"] * (1 - loop.resumed_from / batching.steps) / train_seconds,
            "first_step_seconds": (loop.first_step_at or time.time()) - job.started_at,
            "resumed_from": loop.resumed_from,
            "workers": world_size,
            "zero_stage": compute.zero_stage,
            "dtype": dtype,
            "device": torch.cuda.get_device_name() if compute.device == "gpu" else "cpu",
            "peak_memory_bytes": peak_memory,
            "micro_batch_size": batching.micro_batch_size,
            **reload_check,
        }
        loop.write_outcome(facts, runtime_stats)
    dist.barrier()


def _load_task(job: Job, rank: int) -> TrainingTask:
    # The task's module imports transformers' Trainer, which must not be imported before `prepare_process` has run.
    task: TrainingTask = load_object(TRAINERS[job.spec.kind].trainer)(job, rank)
    return task


def _training_arguments(job: Job, batching: Batching, dtype: str) -> dict[str, Any]:
    """Return the transformers TrainingArguments that all stage kinds share."""
    from tunery.training.deepspeed_config import deepspeed_config

    spec, compute = job.spec, job.compute
    return {
        "output_dir": str(job.staging_dir / "checkpoints"),
        "max_steps": batching.steps,
        "per_device_train_batch_size": batching.micro_batch_size,
        "per_device_eval_batch_size": max(8, batching.micro_batch_size),
        "gradient_accumulation_steps": batching.gradient_accumulation_steps,
        "learning_rate": spec.learning_rate,  # only the initial value
        "lr_scheduler_type": "constant",  # TrainingCallback sets the learning rate of each step
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "bf16": dtype == "bf16",
        "use_cpu": compute.device == "cpu",
        "gradient_checkpointing": compute.gradient_checkpointing,
        "seed": job.seed,
        "average_tokens_across_devices": True,  # the loss is the mean over the tokens of all ranks
        "logging_nan_inf_filter": False,  # True would log a non-finite loss as 0 (training/divergence.py)
        "logging_strategy": "no",  # LoopControl decides when to log, evaluate and save
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "deepspeed": deepspeed_config(compute.zero_stage, compute.offload),
    }


def _common_facts(job: Job, batching: Batching, trainer: Any, history: list[dict[str, float]]) -> dict[str, Any]:
    """Return the facts that all stage kinds share (training_stats.py)."""
    sizes = [(num_elements(parameter), parameter.requires_grad) for parameter in trainer.model.parameters()]
    num_parameters = sum(size for size, _ in sizes)
    num_trainable = sum(size for size, requires_grad in sizes if requires_grad)
    return training_facts(job.spec, batching, history, num_parameters, num_trainable)

"""What each worker runs for every training except PPO (ppo/ppo_worker.py): build data, model and transformers Trainer,
train, save and check the model; rank 0 writes the facts. TrainingCallback sets the learning rate of each step.

The loss of `pretrain` and `sft` is the mean over the loss tokens of a step, on all ranks and micro batches; of `dpo`,
`kto`, `reward` and `classifier` the mean over their pairs or rows; of `grpo` and `rloo` as TRL defines it.
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
from tunery.training.job import Job, Report, TrainerAdapter, event_emitter, rows_of
from tunery.training.schedule import schedule
from tunery.training.sequences import mixture_facts, mixture_of
from tunery.training.training_stats import log_period, num_elements, peak_memory_bytes, save_period, training_facts


def train(job: Job, report: Report) -> None:
    """Train in each worker; all ranks call it. Writes `out/` (model or adapter), then `work/outcome.json`.

    Raises StageError if the training diverges, or if the saved model is not the trained one.
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

    rank, world = dist.get_rank(), dist.get_world_size()
    emit = event_emitter(job, rank)
    emit("progress", done=0, total=None, unit="steps", detail="loading model and rows")
    dtype = pick_dtype(compute.precision, compute.device)
    set_seed(job.seed)
    task = _load_task(job, rank)
    batching = plan_training(spec, len(task.examples.lengths), world, compute.micro_batch_size)
    num_iterations = spec.steps_per_batch
    size = batching.global_batch_size // spec.sequences_per_row
    lengths = task.examples.lengths
    mixture = mixture_of(spec, task.examples)
    order = data_order(lengths, batching.steps // num_iterations, size, job.seed, mixture)
    cumulative_tokens = np.concatenate([[0], np.cumsum(lengths[order])])
    rows_per_step = size / num_iterations
    loop = LoopControl(
        job,
        batching.steps,
        emit,
        has_eval_data=bool(job.eval_rows),
        log_period=log_period(batching.steps),
        save_period=save_period(compute, batching.steps),
        signature=checkpoint_signature(world, compute.zero_stage, dtype),
        rows_per_step=rows_per_step,
        tokens_at=lambda step: int(cumulative_tokens[round(step * rows_per_step)]),
        report=report,
        rank=rank,
        steps_per_batch=num_iterations,
    )
    callback = TrainingCallback(loop, schedule(spec, batching.steps), TRAINERS[spec.kind].extra_metrics)
    trainer = task.trainer(_training_arguments(job, batching, dtype), order, callback)
    if rank == 0:
        emit("preview", **stage_preview(spec, rows_of(job.rows, COLUMNS), trainer.processing_class, trainer.model))
    trainer.remove_callback(PrinterCallback)
    # Unused here, and transformers (5.23) iterates over all parameters for it at each step.
    trainer.floating_point_ops = lambda inputs: 0
    callback.attach(trainer)
    checkpoint = loop.resume()
    loop.flush_reports()
    begin = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.time() - begin
    loop.check_end(trainer.model.named_parameters())
    peak_memory = peak_memory_bytes(compute.device)
    final_metrics = task.final_metrics(trainer)
    parameters = sum(map(num_elements, trainer.model.parameters()))
    probe = task.probe(parameters)
    outputs = probe.trained(trainer)
    task.save(trainer)
    reload_check = check_saved(job, rank, dtype, parameters, outputs, probe.saved, probe.what)
    if rank == 0:
        facts = {
            **task.data_stats(),
            **mixture_facts(spec, task.examples, order),
            "tokens": int(cumulative_tokens[-1]),
            **_training_facts(job, batching, trainer, loop.history),
            **final_metrics,
        }
        runtime_stats = {
            "train_seconds": seconds,
            "tokens_per_second": facts["tokens"] * (1 - loop.resumed_from / batching.steps) / seconds,
            "first_step_seconds": (loop.first_step_at or time.time()) - job.started,
            "resumed_from": loop.resumed_from,
            "workers": world,
            "zero_stage": compute.zero_stage,
            "dtype": dtype,
            "device": torch.cuda.get_device_name() if compute.device == "gpu" else "cpu",
            "peak_memory_bytes": peak_memory,
            "micro_batch_size": batching.micro_batch_size,
            **reload_check,
        }
        loop.write_outcome(facts, runtime_stats)
    dist.barrier()


def _load_task(job: Job, rank: int) -> TrainerAdapter:
    # Imported only now: transformers' Trainer must not be imported before `prepare_process` has run.
    task: TrainerAdapter = load_object(TRAINERS[job.spec.kind].trainer)(job, rank)
    return task


def _training_arguments(job: Job, batching: Batching, dtype: str) -> dict[str, Any]:
    """Return the transformers TrainingArguments that all stage kinds share."""
    from tunery.training.deepspeed_config import deepspeed_config

    spec, compute = job.spec, job.compute
    return {
        "output_dir": str(job.work / "checkpoints"),
        "max_steps": batching.steps,
        "per_device_train_batch_size": batching.micro_batch_size,
        "per_device_eval_batch_size": max(8, batching.micro_batch_size),
        "gradient_accumulation_steps": batching.accumulation,
        "learning_rate": spec.learning_rate,
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


def _training_facts(job: Job, batching: Batching, trainer: Any, history: list[dict[str, float]]) -> dict[str, Any]:
    sizes = [(num_elements(parameter), parameter.requires_grad) for parameter in trainer.model.parameters()]
    parameters = sum(size for size, _ in sizes)
    trainable = sum(size for size, requires_grad in sizes if requires_grad)
    return training_facts(job.spec, batching, history, parameters, trainable)

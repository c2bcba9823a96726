"""The training loop of each worker: rows, model, trainer, checkpoints; rank 0 writes the artifact."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from tunery.events.event_log import EventLog
from tunery.models.precision import pick_dtype
from tunery.models.preview import COLUMNS, stage_preview
from tunery.spec import TRAINERS
from tunery.spec.plugins import load_object
from tunery.training.batches import Batching, at_even_steps, data_order, plan_training
from tunery.training.job import Job, Report, TrainerAdapter, rows_of
from tunery.training.schedule import schedule
from tunery.training.sequences import mixture_facts, mixture_of
from tunery.training.training_stats import (
    evaluations_of,
    log_period,
    relog_history,
    report_of,
    save_period,
    training_facts,
)


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

    from tunery.training.checkpoints import (
        HISTORY,
        checkpoint_signature,
        last_checkpoint,
        read_history,
        remove_incompatible,
        step_of,
    )
    from tunery.training.collectives import broadcast_rank0
    from tunery.training.reload_check import check_saved
    from tunery.training.training_callback import TrainingCallback

    rank, world = dist.get_rank(), dist.get_world_size()
    log = EventLog(job.events / f"{job.trial or 'stage'}-{job.stage}-{rank}.jsonl", stage=job.stage, trial=job.trial)

    def emit(event: str, **values: Any) -> None:
        if rank == 0:
            log.write(event, **values)

    emit("progress", done=0, total=None, unit="steps", detail="loading model and rows")
    dtype = pick_dtype(compute.precision, compute.device)
    set_seed(job.seed)
    adapter = _load_adapter(job, rank)
    batching = plan_training(spec, len(adapter.examples.lengths), world, compute.micro_batch_size)
    num_iterations = spec.steps_per_batch
    size = batching.global_batch_size // spec.sequences_per_row
    lengths = adapter.examples.lengths
    mixture = mixture_of(spec, adapter.examples)
    order = data_order(lengths, batching.steps // num_iterations, size, job.seed, mixture)
    cumulative_tokens = np.concatenate([[0], np.cumsum(lengths[order])])

    def report_evaluation(step: int, metrics: dict[str, float]) -> None:
        # A scheduler may stop a trial at any report, and a finished model must not be lost: the last evaluation is
        # reported with the artifact (search/trial.py).
        if step < batching.steps:
            rows = round(step * size / num_iterations)
            report(report_of(job.stage, step, batching.steps, int(cumulative_tokens[rows]), rows, metrics))

    callback = TrainingCallback(
        at_even_steps(batching.steps, spec.num_evals) if job.eval_rows else [],
        save_period(compute, batching.steps),
        job.work / "checkpoints",
        size / num_iterations,
        batching.steps,
        emit,
        checkpoint_signature(world, compute.zero_stage, dtype),
        report_evaluation,
        job.stage,
        schedule(spec, batching.steps),
        TRAINERS[spec.kind].extra_metrics,
        num_iterations,
        job.stop,
        job.checkpoint_dir,
    )
    trainer = adapter.trainer(_training_arguments(job, batching, dtype), order, callback)
    if rank == 0:
        emit("preview", **stage_preview(spec, rows_of(job.rows, COLUMNS), trainer.processing_class, trainer.model))
    trainer.remove_callback(PrinterCallback)
    # Unused here, and transformers (5.23) iterates over all parameters for it at each step.
    trainer.floating_point_ops = lambda inputs: 0
    callback.attach(trainer)

    if rank == 0:
        remove_incompatible(job.work / "checkpoints", callback.checkpoint_signature)
    dist.barrier()
    checkpoint = broadcast_rank0(last_checkpoint(job.work / "checkpoints", callback.checkpoint_signature))
    dist.barrier()
    resumed_from = step_of(checkpoint) if checkpoint else 0
    if checkpoint:
        callback.history += read_history(checkpoint)
        callback.guard.resume(callback.history)
        if job.resume_from is not None and checkpoint.name == job.resume_from.name:
            relog_history(callback.history, emit)
        for step, metrics in evaluations_of(callback.history):
            report_evaluation(step, metrics)
    begin = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.time() - begin
    callback.check_end()
    peak_memory = torch.cuda.max_memory_allocated() if compute.device == "gpu" else _resident_bytes()
    final_metrics = adapter.final_metrics(trainer)
    parameters = sum(_size(weight) for weight in trainer.model.parameters())
    probe = adapter.probe(parameters)
    outputs = probe.trained(trainer)
    adapter.save(trainer)
    reload_check = check_saved(job, rank, dtype, parameters, outputs, probe.saved, probe.what)
    if rank == 0:
        facts = {
            **adapter.data_stats(),
            **mixture_facts(spec, adapter.examples, order),
            "tokens": int(cumulative_tokens[-1]),
            **_training_facts(job, batching, trainer, callback.history),
            **final_metrics,
        }
        runtime_stats = {
            "train_seconds": seconds,
            "tokens_per_second": facts["tokens"] * (1 - resumed_from / batching.steps) / seconds,
            "first_step_seconds": (callback.first_step_at or time.time()) - job.started,
            "resumed_from": resumed_from,
            "workers": world,
            "zero_stage": compute.zero_stage,
            "dtype": dtype,
            "device": torch.cuda.get_device_name() if compute.device == "gpu" else "cpu",
            "peak_memory_bytes": peak_memory,
            "micro_batch_size": batching.micro_batch_size,
            **reload_check,
        }
        (job.out / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in callback.history))
        (job.work / "outcome.json").write_text(json.dumps({"facts": facts, "runtime_stats": runtime_stats}))
    dist.barrier()


def _load_adapter(job: Job, rank: int) -> TrainerAdapter:
    # Imported only now: transformers' Trainer must not be imported before `prepare_process` has run.
    adapter: TrainerAdapter = load_object(TRAINERS[job.spec.kind].trainer)(job, rank)
    return adapter


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
        "logging_steps": log_period(batching.steps),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # True would log a non-finite loss as 0 (training/divergence.py)
        "eval_strategy": "no",  # TrainingCallback decides when to evaluate and to save
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "deepspeed": deepspeed_config(compute.zero_stage, compute.offload),
    }


def _training_facts(job: Job, batching: Batching, trainer: Any, history: list[dict[str, float]]) -> dict[str, Any]:
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in trainer.model.parameters()]
    parameters = sum(size for size, _ in sizes)
    trainable = sum(size for size, requires_grad in sizes if requires_grad)
    return training_facts(job.spec, batching, history, parameters, trainable)


def _size(parameter: Any) -> int:
    """Number of elements; a parameter sharded by ZeRO-3 has its full size as `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""What every training worker runs: rows, model, trainer, checkpoints; rank 0 writes the artifact."""

from __future__ import annotations

import importlib
import json
import time
from typing import Any

import numpy as np

from tunery.events.event_log import EventLog
from tunery.models.preview import COLUMNS, stage_preview
from tunery.training.batches import Batching, at_even_steps, data_order, group_size, iterations, plan_training
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

TRAINERS = {
    "pretrain": "tunery.training.sft:SftTask",
    "sft": "tunery.training.sft:SftTask",
    "classifier": "tunery.training.classifier:ClassifierTask",
    "reward": "tunery.training.reward:RewardTask",
    "dpo": "tunery.training.dpo:DpoTask",
    "kto": "tunery.training.kto:KtoTask",
    "grpo": "tunery.training.grpo:GrpoTask",
    "rloo": "tunery.training.grpo:GrpoTask",
}
"""By stage kind; named, not imported: transformers' Trainer must not be loaded before the process is ready."""


def train(job: Job, report: Report) -> None:
    """Runs in each worker, all of them together. Writes `out/` (model or adapter), and `work/outcome.json` last.

    Raises StageError where the training diverges, or where the saved model is not the trained one.
    """
    from tunery.training.worker_setup import pick_dtype, prepare_process

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
    from tunery.training.training_callback import MORE_CURVES, TrainingCallback

    rank, world = dist.get_rank(), dist.get_world_size()
    log = EventLog(job.events / f"{job.trial or 'stage'}-{job.stage}-{rank}.jsonl", stage=job.stage, trial=job.trial)

    def emit(event: str, **values: Any) -> None:
        if rank == 0:
            log.write(event, **values)

    emit("progress", done=0, total=None, unit="steps", detail="loading model and rows")
    dtype = pick_dtype(compute.precision, compute.device)
    set_seed(job.seed)
    recipe = _trainer_adapter(job, rank)
    batching = plan_training(spec, len(recipe.examples.lengths), world, compute.micro_batch_size)
    again = iterations(spec)
    size = batching.global_batch_size // group_size(spec)
    lengths = recipe.examples.lengths
    mixture = mixture_of(spec, recipe.examples)
    order = data_order(lengths, batching.steps // again, size, job.seed, mixture)
    tokens = np.concatenate([[0], np.cumsum(lengths[order])])

    def tell(step: int, metrics: dict[str, float]) -> None:
        # A scheduler may stop a trial at any report: at the last one the model would be lost for nothing, so that one
        # is told with the finished artifact (search/trial.py).
        if step < batching.steps:
            rows = round(step * size / again)
            report(report_of(job.stage, step, batching.steps, int(tokens[rows]), rows, metrics))

    steps = TrainingCallback(
        at_even_steps(batching.steps, spec.num_evals) if job.eval_rows else [],
        save_period(compute, batching.steps),
        job.work / "checkpoints",
        size / again,
        batching.steps,
        emit,
        checkpoint_signature(world, compute.zero_stage, dtype),
        tell,
        job.stage,
        MORE_CURVES.get(spec.kind, ()),
        again,
        job.stop,
        job.kept,
        schedule(spec, batching.steps) if spec.schedule_overrides else None,
    )
    trainer = recipe.trainer(_arguments(job, batching, dtype), order, steps)
    if rank == 0:
        emit("preview", **stage_preview(spec, rows_of(job.rows, COLUMNS), trainer.processing_class, trainer.model))
    trainer.remove_callback(PrinterCallback)
    # Nobody asks for it, and transformers (5.23) goes through all parameters for it at each step.
    trainer.floating_point_ops = lambda inputs: 0
    steps.attach(trainer)

    if rank == 0:
        remove_incompatible(job.work / "checkpoints", steps.written_by)
    dist.barrier()
    checkpoint = broadcast_rank0(last_checkpoint(job.work / "checkpoints", steps.written_by))
    dist.barrier()
    resumed = step_of(checkpoint) if checkpoint else 0
    if checkpoint:
        steps.history += read_history(checkpoint)
        steps.guard.resume(steps.history)
        if job.begins_with is not None and checkpoint.name == job.begins_with.name:
            relog_history(steps.history, emit)
        for step, measured in evaluations_of(steps.history):
            tell(step, measured)
    begin = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.time() - begin
    steps.check_end()
    peak = torch.cuda.max_memory_allocated() if compute.device == "gpu" else _resident_bytes()
    found = recipe.found(trainer)
    parameters = sum(_size(weight) for weight in trainer.model.parameters())
    probe = recipe.probe(parameters)
    outputs = probe.trained(trainer)
    recipe.save(trainer)
    checked = check_saved(job, rank, dtype, parameters, outputs, probe.saved, probe.what)
    if rank == 0:
        facts = {
            **recipe.counted(),
            **mixture_facts(spec, recipe.examples, order),
            "tokens": int(tokens[-1]),
            **_facts(job, batching, trainer, steps.history),
            **found,
        }
        timed = {
            "train_seconds": seconds,
            "tokens_per_second": facts["tokens"] * (1 - resumed / batching.steps) / seconds,
            "first_step_seconds": (steps.first_step_at or time.time()) - job.started,
            "resumed_from": resumed,
            "workers": world,
            "zero_stage": compute.zero_stage,
            "dtype": dtype,
            "device": torch.cuda.get_device_name() if compute.device == "gpu" else "cpu",
            "peak_memory_bytes": peak,
            "micro_batch_size": batching.micro_batch_size,
            **checked,
        }
        (job.out / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in steps.history))
        (job.work / "outcome.json").write_text(json.dumps({"facts": facts, "measured": timed}))
    dist.barrier()


def _trainer_adapter(job: Job, rank: int) -> TrainerAdapter:
    module, name = TRAINERS[job.spec.kind].split(":")
    recipe: TrainerAdapter = getattr(importlib.import_module(module), name)(job, rank)
    return recipe


def _arguments(job: Job, batching: Batching, dtype: str) -> dict[str, Any]:
    """For transformers' TrainingArguments, whatever the kind."""
    from tunery.training.deepspeed_config import deepspeed_config

    spec, compute = job.spec, job.compute
    return {
        "output_dir": str(job.work / "checkpoints"),
        "max_steps": batching.steps,
        "per_device_train_batch_size": batching.micro_batch_size,
        "per_device_eval_batch_size": max(8, batching.micro_batch_size),
        "gradient_accumulation_steps": batching.accumulation,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(spec.schedule, spec.schedule),
        "warmup_steps": round(spec.warmup * batching.steps),
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "bf16": dtype == "bf16",
        "use_cpu": compute.device == "cpu",
        "gradient_checkpointing": compute.gradient_checkpointing,
        "seed": job.seed,
        "logging_steps": log_period(batching.steps),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would log a loss that is not finite as 0 (training/divergence.py)
        "eval_strategy": "no",  # Steps says when to evaluate and when to save
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "deepspeed": deepspeed_config(compute.zero_stage, compute.offload),
    }


def _facts(job: Job, batching: Batching, trainer: Any, history: list[dict[str, float]]) -> dict[str, Any]:
    parameters = [(_size(p), p.requires_grad) for p in trainer.model.parameters()]
    whole, trained = sum(size for size, _ in parameters), sum(size for size, trained in parameters if trained)
    return training_facts(job.spec, batching, history, whole, trained)


def _size(parameter: Any) -> int:
    """Elements; a parameter that ZeRO-3 has sharded knows its whole size as `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

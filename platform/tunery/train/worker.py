"""What every training worker runs: tokens, model, trainer, checkpoints; rank 0 writes the artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import StageError
from tunery.models.encode import Encoded
from tunery.spec import Compute, Pretrain, Sft
from tunery.store.rows import CONTENT, Row, read_rows
from tunery.track.events import EventLog
from tunery.train.batches import Batching, at_even_steps, data_order, plan_batches


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; plain data, so that it travels to any host that sees the store."""

    stage: str
    trial: str
    spec: Pretrain | Sft
    """With no `auto` left in it."""
    seed: int
    model: dict[str, Any]
    """models.load.Source, or {"scratch": name}."""
    rows: Path
    eval_rows: Path | None
    out: Path
    work: Path
    events: Path
    compute: Compute
    workers: int
    started: float
    """When the stage was asked for, seconds since the epoch."""


Report = Callable[[dict[str, float]], None]


def train(job: Job, report: Report) -> None:
    """Runs in each worker, all of them together. Writes `out/` (model or adapter), and `work/outcome.json` last."""
    from tunery.train.worker_setup import pick_dtype, prepare_process

    compute = job.compute
    prepare_process(compute.device, compute.cpus_per_worker)
    import torch
    import torch.distributed as dist
    from transformers import set_seed

    rank, world = dist.get_rank(), dist.get_world_size()
    log = EventLog(job.events / f"{job.trial or 'stage'}-{job.stage}-{rank}.jsonl", stage=job.stage, trial=job.trial)

    def emit(event: str, **values: Any) -> None:
        if rank == 0:
            log.write(event, **values)

    emit("progress", done=0, total=None, unit="steps", detail="loading model and rows")
    dtype = pick_dtype(compute.precision, compute.device)
    set_seed(job.seed)
    from tunery.models.load import is_adapter, load_tokenizer

    source = job.model
    if "scratch" in source:
        source = _new_model(job, rank)
    elif compute.zero_stage == 3 and is_adapter(source):
        source = _merged(job, source, rank)
    tokenizer = load_tokenizer(source)
    data = _tokens(job.spec, read_rows(job.rows, CONTENT), tokenizer)
    if not data.ids:
        raise StageError(
            job.stage,
            f"none of {data.rows} rows gives a training sequence",
            cause="every answer is empty, or cut off because the question alone fills max_length"
            if isinstance(job.spec, Sft)
            else f"all texts together have fewer than max_length ({job.spec.max_length}) tokens",
            remedy=f"change max_length (now {job.spec.max_length}), or give other rows",
        )
    evaluation = _tokens(job.spec, read_rows(job.eval_rows, CONTENT), tokenizer) if job.eval_rows else None
    if evaluation is not None and not evaluation.ids:
        raise StageError(
            job.stage,
            f"none of the {evaluation.rows} rows of `{job.spec.eval_data}` can be evaluated",
            cause=f"they are shorter than a block of max_length ({job.spec.max_length}) tokens"
            if isinstance(job.spec, Pretrain)
            else "every answer is empty, or cut off because the question alone fills max_length",
            remedy="change max_length, or give other rows as eval_data",
        )
    spec = job.spec
    assert spec.epochs != "auto", "resolved by the launcher"
    assert spec.global_batch_size != "auto", "resolved by the launcher"
    micro = None if compute.micro_batch_size == "auto" else compute.micro_batch_size
    batching = plan_batches(len(data.ids), spec.epochs, spec.global_batch_size, world, micro)
    trainer, steps = _trainer(job, source, tokenizer, data, evaluation, batching, dtype, emit, report)

    from tunery.train.trainer import HISTORY, drop_foreign, last_checkpoint

    if rank == 0:
        drop_foreign(job.work / "checkpoints", steps.written_by)
    dist.barrier()
    checkpoint = last_checkpoint(job.work / "checkpoints", steps.written_by)
    dist.barrier()
    resumed = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    if checkpoint:
        steps.history += [json.loads(line) for line in (checkpoint / HISTORY).read_text().splitlines()]
    begin = time.time()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.time() - begin
    peak = torch.cuda.max_memory_allocated() if compute.device == "gpu" else _resident_bytes()
    _save(trainer, tokenizer, source, job, rank)
    if rank == 0:
        tokens = sum(len(data.ids[index]) for index in data.order[resumed * spec.global_batch_size :])
        history = steps.history
        facts = _facts(job, data, batching, trainer, history)
        measured = {
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "first_step_seconds": (steps.first_step_at or time.time()) - job.started,
            "resumed_from": resumed,
            "workers": world,
            "zero_stage": compute.zero_stage,
            "dtype": dtype,
            "device": torch.cuda.get_device_name() if compute.device == "gpu" else "cpu",
            "peak_memory_bytes": peak,
            "micro_batch_size": batching.micro_batch_size,
        }
        (job.out / "history.jsonl").write_text("".join(json.dumps(point) + "\n" for point in history))
        (job.work / "outcome.json").write_text(json.dumps({"facts": facts, "measured": measured}))
    dist.barrier()


@dataclass
class Tokens:
    """Training sequences; `order` is filled in when the batches are planned."""

    ids: list[list[int]]
    labels: list[list[int]]
    rows: int
    truncated: int
    unusable: int
    """Rows without any token to learn from (an empty answer, or one cut off whole)."""
    order: list[int]


def _tokens(spec: Pretrain | Sft, rows: Iterable[Row], tokenizer: Any) -> Tokens:
    from tunery.models.encode import blocks, encode

    encoded: list[Encoded] = []
    pending: list[Row] = []
    # Texts are cut into blocks anyway: only conversations are cut to length one by one.
    longest = 10**9 if isinstance(spec, Pretrain) else spec.max_length
    for row in rows:
        pending.append(row)
        if len(pending) == 1000:
            encoded += encode(pending, tokenizer, longest)
            pending = []
    encoded += encode(pending, tokenizer, longest)
    if isinstance(spec, Pretrain):
        ids = list(blocks(encoded, spec.max_length))
        return Tokens(ids, ids, len(encoded), 0, 0, [])
    usable = [item for item in encoded if item.counted > 0]
    return Tokens(
        [item.ids for item in usable],
        [item.labels for item in usable],
        len(encoded),
        sum(item.truncated for item in encoded),
        len(encoded) - len(usable),
        [],
    )


def _new_model(job: Job, rank: int) -> dict[str, Any]:
    """Rank 0 makes it, once; a later try finds it."""
    import torch.distributed as dist

    from tunery.models.scratch import write_scratch_model

    folder = job.work / "new"
    if rank == 0 and not (folder / "whole").is_file():
        texts = (_plain_text(row) for row in read_rows(job.rows, CONTENT))
        write_scratch_model(folder, job.model["scratch"], texts, job.seed)
        (folder / "whole").touch()
    dist.barrier()
    return {"pretrained": str(folder), "revision": None}


def _merged(job: Job, source: dict[str, Any], rank: int) -> dict[str, Any]:
    """An adapter merged into its base by rank 0 alone: under ZeRO-3 the base would load in pieces, and PEFT (0.21)
    merges whole weights only."""
    import torch
    import torch.distributed as dist

    from tunery.models.load import load_model, load_tokenizer

    folder = job.work / "merged"
    if rank == 0 and not (folder / "whole").is_file():
        load_model(source, torch.float32).save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
        (folder / "whole").touch()
    dist.barrier()
    return {"pretrained": str(folder), "revision": None}


def _plain_text(row: Row) -> str:
    return row["text"] or "\n".join(turn["content"] for turn in row["messages"])


def _trainer(
    job: Job,
    source: dict[str, Any],
    tokenizer: Any,
    data: Tokens,
    evaluation: Tokens | None,
    batching: Batching,
    dtype: str,
    emit: Callable[..., None],
    report: Report,
) -> tuple[Any, Any]:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig

    from tunery.models.load import load_model
    from tunery.models.tuners import lora_config
    from tunery.train.deepspeed_config import deepspeed_config
    from tunery.train.trainer import Steps, Trainer, written_by

    spec, compute = job.spec, job.compute
    size = batching.global_batch_size
    data.order[:] = data_order([len(ids) for ids in data.ids], batching.steps, size, job.seed)
    train_set = Dataset.from_dict({"input_ids": data.ids, "labels": data.labels}).select(data.order)
    eval_set = Dataset.from_dict({"input_ids": evaluation.ids, "labels": evaluation.labels}) if evaluation else None
    every = compute.checkpoint_steps
    arguments = SFTConfig(
        output_dir=str(job.work / "checkpoints"),
        max_steps=batching.steps,
        per_device_train_batch_size=batching.micro_batch_size,
        per_device_eval_batch_size=max(8, batching.micro_batch_size),
        gradient_accumulation_steps=batching.accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(spec.schedule, spec.schedule),
        warmup_steps=round(spec.warmup * batching.steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        bf16=dtype == "bf16",
        use_cpu=compute.device == "cpu",
        gradient_checkpointing=compute.gradient_checkpointing,
        seed=job.seed,
        logging_steps=max(1, batching.steps // 50),
        logging_first_step=True,
        eval_strategy="no",  # Steps says when to evaluate and when to save
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_drop_last=True,
        deepspeed=deepspeed_config(compute.zero_stage),
    )
    # The model is loaded after the arguments: under ZeRO-3 they make transformers shard it while loading.
    model = load_model(source, torch.float32)
    model.config.use_cache = False
    steps = Steps(
        at_even_steps(batching.steps, spec.evaluations) if eval_set is not None else [],
        max(20, batching.steps // 10) if every == "auto" else every,
        job.work / "checkpoints",
        size,
        batching.steps,
        emit,
        written_by(batching.workers, compute.zero_stage, dtype),
        lambda step, metrics: _report_unless_last(report, step, size, batching.steps, metrics),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        peft_config=lora_config(spec.tuner.lora) if isinstance(spec, Sft) and not isinstance(spec.tuner, str) else None,
        callbacks=[steps],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, steps


def _report_unless_last(report: Report, step: int, size: int, steps: int, metrics: dict[str, float]) -> None:
    """A scheduler may stop a trial at any report: at the last one the model would be lost for nothing, so that one is
    told with the finished artifact (search/trial.py)."""
    if step < steps:
        report({"step": float(step), "rows": float(step * size), **metrics})


def _save(trainer: Any, tokenizer: Any, source: dict[str, Any], job: Job, rank: int) -> None:
    """All ranks take part (ZeRO-3 gathers); only what loads the model again is kept, and no paths or dates."""
    from tunery.models.load import write_base

    adapter = isinstance(job.spec, Sft) and job.spec.tuner != "full"
    folder = job.out / ("adapter" if adapter else "model")
    trainer.model.config.use_cache = True
    trainer.save_model(str(folder))
    if rank == 0:
        tokenizer.save_pretrained(folder)
        for name in ("training_args.bin", "README.md"):
            (folder / name).unlink(missing_ok=True)
        if adapter:
            write_base(job.out, job.model if "scratch" not in job.model else source)


def _facts(job: Job, data: Tokens, batching: Batching, trainer: Any, history: list[dict[str, float]]) -> dict[str, Any]:
    losses = [point["loss"] for point in history if "loss" in point]
    evals = [point["eval_loss"] for point in history if "eval_loss" in point]
    parameters = [(_size(p), p.requires_grad) for p in trainer.model.parameters()]
    return {
        "rows": data.rows,
        "sequences": len(data.ids),
        "truncated": data.truncated,
        "unusable": data.unusable,
        "tokens": sum(len(data.ids[index]) for index in data.order),
        "steps": batching.steps,
        "epochs": job.spec.epochs,
        "global_batch_size": batching.global_batch_size,
        "learning_rate": job.spec.learning_rate,
        "parameters": sum(size for size, _ in parameters),
        "trainable": sum(size for size, trained in parameters if trained),
        "loss": sum(losses[-5:]) / len(losses[-5:]) if losses else None,
        "eval_loss": evals[-1] if evals else None,
    }


def _size(parameter: Any) -> int:
    """Elements; a parameter that ZeRO-3 has sharded knows its whole size as `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

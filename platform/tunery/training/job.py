"""The description of a training that is sent to its workers, and file operations that all trainers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunery.events.event_log import EventLog
from tunery.models.load import Source
from tunery.models.tokenized_dataset import Integers, TokenStats
from tunery.spec import Compute, Training
from tunery.store.rows import Row, read_rows


@dataclass(frozen=True)
class RowSource:
    """The rows of an artifact (or of a folder in it). `label`: of all rows, if they have no labels of their own."""

    path: Path
    label: bool | None = None


@dataclass(frozen=True)
class Job:
    """Everything a worker needs. Plain data, so that it can be sent to any host that has access to the store."""

    stage: str
    trial: str
    spec: Training[Any]
    """All `auto` values are resolved."""
    seed: int
    model: dict[str, Any]
    """models.load.Source, or {"scratch": name}."""
    rows: tuple[RowSource, ...]
    eval_rows: tuple[RowSource, ...]
    reward: dict[str, Any] | None
    """models.reward_functions.RewardOrigin, for trainers that generate responses."""
    ptx_rows: tuple[RowSource, ...]
    """Rows for PPO's additional language-modelling loss."""
    out: Path
    """The artifact's folder."""
    work: Path
    """Folder for checkpoints and other temporary files."""
    store: Path
    """The store's root."""
    events: Path
    """Folder of the event logs."""
    compute: Compute
    workers: int
    started: float
    """When the stage started, in seconds since the epoch."""
    stop: Path | None = None
    """If this file appears, the training raises Stopped."""
    checkpoint_dir: Path | None = None
    """Folder that keeps a checkpoint of each evaluation, so that other trials can resume from it
    (search/population.py). An evaluation is reported once its checkpoint is written."""
    resume_from: Path | None = None
    """Such a checkpoint, written by another training that is identical up to there."""


Report = Callable[[dict[str, float]], None]
"""Reports an evaluation to the search."""
Emit = Callable[..., None]
"""Writes an event with its fields."""


def event_emitter(job: Job, rank: int) -> Emit:
    """Return the function that writes the events of a training, on rank 0 only."""
    log = EventLog(job.events / f"{job.trial or 'stage'}-{job.stage}-{rank}.jsonl", stage=job.stage, trial=job.trial)

    def emit(event: str, **values: Any) -> None:
        if rank == 0:
            log.write(event, **values)

    return emit


class Examples(Protocol):
    """The examples of a training: sequences, pairs of sequences, or prompts."""

    @property
    def lengths(self) -> Integers:
        """(examples,) tokens of each."""

    @property
    def part_sizes(self) -> Sequence[int]:
        """Examples of each data stage."""

    @property
    def part_stats(self) -> Sequence[TokenStats]:
        """Row counts of each data stage."""


class TrainerAdapter(Protocol):
    """The part of a training that depends on the stage kind; training/worker.py does the rest. Constructed in every
    worker from (job, rank), after the process is set up and seeded. Raises StageError if the rows are unusable."""

    examples: Examples

    def trainer(self, arguments: dict[str, Any], order: Integers, callback: Any) -> Any:
        """Build the transformers Trainer with its model. `arguments`: for its TrainingArguments; `order`: indices of
        the examples in training order. Construct the TrainingArguments before loading the model: under ZeRO-3 they make
        transformers shard the model while it loads."""

    def save(self, trainer: Any) -> None:
        """Write the model to `job.out`. Call on all ranks."""

    def probe(self, parameters: int) -> Any:
        """Return a reload_check.Probe of the training rows. `parameters`: number of model parameters."""

    def data_stats(self) -> dict[str, Any]:
        """Return the row counts for the facts."""

    def final_metrics(self, trainer: Any) -> dict[str, Any]:
        """Return metrics for the facts, besides the losses. Called on all ranks, before the model is saved."""


def rows_of(sources: Sequence[RowSource], columns: list[str]) -> Iterator[Row]:
    """Iterate over the rows of all sources."""
    for source in sources:
        yield from read_rows(source.path, columns)


def write_once(folder: Path, rank: int, write: Callable[[Path], None]) -> Source:
    """Write a model on rank 0, unless an earlier attempt has; return it as a model source. Call on all ranks."""
    import torch.distributed as dist

    if rank == 0 and not (folder / "whole").is_file():
        write(folder)
        (folder / "whole").touch()
    dist.barrier()
    return {"pretrained": str(folder), "revision": None}


def save_model(trainer: Any, folder: Path, tokenizer: Any, rank: int) -> None:
    """Save model and tokenizer, without files that hold paths or dates. Call on all ranks: ZeRO-3 gathers weights."""
    trainer.save_model(str(folder))
    if rank == 0:
        tokenizer.save_pretrained(folder)
        for name in ("training_args.bin", "README.md"):
            (folder / name).unlink(missing_ok=True)

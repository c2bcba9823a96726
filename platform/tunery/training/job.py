"""The description of a training that is sent to its workers, the interface of a kind of training, and file operations
that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunery.events.event_log import EventLog
from tunery.models.load import Source
from tunery.models.reward_functions import RewardOrigin
from tunery.models.tokenized_dataset import Integers, TokenStats
from tunery.spec import Compute, Training
from tunery.store.atomic_write import sync_tree, write_text
from tunery.store.rows import Row, read_rows


@dataclass(frozen=True)
class RowSource:
    """A folder of rows: an artifact, or a folder in one."""

    path: Path
    label: bool | None = None
    """Label of all rows, which replaces their own; None keeps their own."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training: everything that its workers need. Plain data, so that it can be sent to any host that has access to
    the store."""

    stage: str
    """Name of the stage."""
    trial: str
    """Name of the trial; "" for a stage of the experiment file."""
    spec: Training[Any]
    """The stage, with all `auto` values resolved."""
    seed: int
    model: dict[str, Any]
    """Initial model: models.load.Source, or {"scratch": name}."""
    data: tuple[RowSource, ...]
    """Training rows, one source per data stage."""
    eval_data: tuple[RowSource, ...]
    """Evaluation rows; () without `eval_data`."""
    reward: RewardOrigin | None = None
    """Where the reward is loaded from, for a stage kind with the key `reward`; otherwise None."""
    ptx_data: tuple[RowSource, ...] = ()
    """Rows of `ptx.data`, for a stage kind with the key `ptx` (PPO)."""
    out: Path
    """Folder of the artifact."""
    staging_dir: Path
    """Folder for checkpoints and temporary files. Later attempts of the same stage use it too."""
    store: Path
    """Root of the store."""
    events: Path
    """Folder of the event logs."""
    compute: Compute
    """Resources, without `auto`."""
    started_at: float
    """When the stage started, in seconds since the epoch."""
    stop_file: Path | None = None
    """If this file exists, the training raises Stopped."""
    checkpoint_dir: Path | None = None
    """Folder that keeps the checkpoint of each evaluation, so that other trials can resume from it
    (search/population.py). An evaluation is reported after its checkpoint is written."""
    resume_from: Path | None = None
    """Checkpoint of another training to resume from. Both trainings are identical up to its step."""


Report = Callable[[dict[str, float]], bool | None]
"""Reports an evaluation to the search: progress and metrics (training_stats.py, `report_of`). Returns True if the
training should stop."""
Emit = Callable[..., None]
"""emit(event, field=value, ..) writes an event to the event log."""


def event_emitter(job: Job, rank: int) -> Emit:
    """Return the function that writes the events of a training. On ranks other than 0 it does nothing."""
    log = EventLog(job.events / f"{job.trial or 'stage'}-{job.stage}-{rank}.jsonl", stage=job.stage, trial=job.trial)

    def emit(event: str, **values: Any) -> None:
        if rank == 0:
            log.write(event, **values)

    return emit


class Examples(Protocol):
    """The examples of a training: sequences, pairs of sequences, or prompts."""

    @property
    def lengths(self) -> Integers:
        """(examples,) int64, number of tokens of each example."""

    @property
    def part_sizes(self) -> Sequence[int]:
        """Number of examples of each data stage."""

    @property
    def part_stats(self) -> Sequence[TokenStats]:
        """Row, sequence and token counts of each data stage."""


class TrainingTask(Protocol):
    """The part of a training that depends on the stage kind: data, trainer, saving and facts. training/worker.py does
    the rest.

    Every worker constructs it from (job, rank), after its process is set up and seeded. The constructor raises
    StageError if the rows are unusable.
    """

    examples: Examples

    def build_trainer(self, arguments: dict[str, Any], order: Integers, callback: Any) -> Any:
        """Load the model and return its transformers Trainer.

        arguments: for its TrainingArguments; order: indices of the examples in training order, (steps x batch size,);
        callback: a TrainerCallback. Construct the TrainingArguments before loading the model: under ZeRO-3 they make
        transformers shard the model while it loads.
        """

    def save(self, trainer: Any) -> None:
        """Write the model to `job.out`. Call on all ranks."""

    def probe(self, num_parameters: int) -> Any:
        """Return a reload_check.Probe that runs training sequences through a model with so many parameters."""

    def data_stats(self) -> dict[str, Any]:
        """Return the row counts for the facts."""

    def final_metrics(self, trainer: Any) -> dict[str, Any]:
        """Return metrics for the facts, besides the losses. Call on all ranks, before the model is saved."""


def rows_of(sources: Sequence[RowSource], columns: list[str]) -> Iterator[Row]:
    """Yield the rows of all sources, one source after another."""
    for source in sources:
        yield from read_rows(source.path, columns)


def write_once(folder: Path, rank: int, write: Callable[[Path], None]) -> Source:
    """Write a model to `folder` on rank 0, unless an earlier attempt has; return its source. Call on all ranks."""
    import torch.distributed as dist

    if rank == 0 and not (folder / "whole").is_file():
        write(folder)
        sync_tree(folder)
        write_text(folder / "whole", "")
    dist.barrier()
    return {"pretrained": str(folder), "revision": None}


def save_model(trainer: Any, folder: Path, tokenizer: Any, rank: int) -> None:
    """Save model and tokenizer, without files that contain paths or dates. Call on all ranks: ZeRO-3 gathers
    weights."""
    trainer.save_model(str(folder))
    if rank == 0:
        tokenizer.save_pretrained(folder)
        for name in ("training_args.bin", "README.md"):
            (folder / name).unlink(missing_ok=True)

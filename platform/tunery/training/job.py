"""A training, as it travels to its workers, and what all kinds of training do alike with files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunery.models.load import Source
from tunery.models.tokenized_dataset import Integers, TokenStats
from tunery.spec import Compute, Training
from tunery.store.rows import Row, read_rows


@dataclass(frozen=True)
class RowSource:
    """An artifact's rows (or those of a folder in it), and the label of all of them where they don't bear one each."""

    path: Path
    label: bool | None = None


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; plain data, so that it travels to any host that sees the store."""

    stage: str
    trial: str
    spec: Training[Any]
    """With no `auto` left in it."""
    seed: int
    model: dict[str, Any]
    """models.load.Source, or {"scratch": name}."""
    rows: tuple[RowSource, ...]
    eval_rows: tuple[RowSource, ...]
    reward: dict[str, Any] | None
    """models.reward.RewardOrigin: what rates answers, of a training that draws some."""
    ptx_rows: tuple[RowSource, ...]
    """Rows whose likelihood is mixed into PPO's loss."""
    out: Path
    work: Path
    store: Path
    """The store's root."""
    events: Path
    compute: Compute
    workers: int
    started: float
    """When the stage was asked for, seconds since the epoch."""
    stop: Path | None = None
    """A file that somebody writes to end the training before its time: it raises Stopped."""
    kept: Path | None = None
    """Where the checkpoints of its evaluations are kept, so that others can begin with them (search/population.py). An
    evaluation is reported when its checkpoint is there."""
    begins_with: Path | None = None
    """Such a checkpoint of another training that is the same up to there."""


Report = Callable[[dict[str, float]], None]


class Examples(Protocol):
    """What a training sees one after another: sequences, pairs of them, or prompts."""

    @property
    def lengths(self) -> Integers:
        """(examples,) tokens of each."""

    @property
    def part_sizes(self) -> Sequence[int]:
        """Examples of each data stage."""

    @property
    def part_stats(self) -> Sequence[TokenStats]:
        """What became of the rows of each data stage."""


class TrainerAdapter(Protocol):
    """What is special about a kind of training; training/worker.py does the rest. Made in every worker, from (job,
    rank), after the process has been made ready and seeded. Raises StageError when the rows won't do."""

    examples: Examples

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: Any) -> Any:
        """A transformers Trainer with its model: `arguments` are for its TrainingArguments, `order` the sequences to
        be seen one after another, `steps` its callback. The arguments come first: under ZeRO-3 they make transformers
        shard a model while it loads."""

    def save(self, trainer: Any) -> None:
        """Writes the model into job.out. All ranks take part."""

    def probe(self, parameters: int) -> Any:
        """A train.reload_check.Probe of the training rows; `parameters`: of the model."""

    def counted(self) -> dict[str, Any]:
        """Facts: what became of the rows."""

    def found(self, trainer: Any) -> dict[str, Any]:
        """Facts that the training brought, beyond its losses. All ranks take part, before the model is saved."""


def rows_of(sources: Sequence[RowSource], columns: list[str]) -> Iterator[Row]:
    """One after another."""
    for source in sources:
        yield from read_rows(source.path, columns)


def write_once(folder: Path, rank: int, write: Callable[[Path], None]) -> Source:
    """A model that rank 0 writes, once; a later try finds it."""
    import torch.distributed as dist

    if rank == 0 and not (folder / "whole").is_file():
        write(folder)
        (folder / "whole").touch()
    dist.barrier()
    return {"pretrained": str(folder), "revision": None}


def save_model(trainer: Any, folder: Path, tokenizer: Any, rank: int) -> None:
    """All ranks take part (ZeRO-3 gathers); only what loads the model again is kept, and no paths or dates."""
    trainer.save_model(str(folder))
    if rank == 0:
        tokenizer.save_pretrained(folder)
        for name in ("training_args.bin", "README.md"):
            (folder / name).unlink(missing_ok=True)

"""Read rows from a file as a dataset stage does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from in_process import stage_context

from tunery.ingest.dataset import run_dataset
from tunery.ingest.read import Quarantined, read_source
from tunery.spec import Dataset
from tunery.store import StageResult
from tunery.store.rows import Row


def dataset(source: str = "a.jsonl", **fields: Any) -> Dataset:
    return Dataset(kind="dataset", source=source, **fields)


def read_file(folder: Path, name: str, **fields: Any) -> tuple[list[Row], list[Quarantined]]:
    """Return the rows and the quarantined records of a file."""
    quarantined: list[Quarantined] = []
    return list(read_source(dataset(name, **fields), folder, quarantined.append)), quarantined


def read(
    folder: Path, content: bytes | str, name: str = "a.jsonl", **fields: Any
) -> tuple[list[Row], list[Quarantined]]:
    """Write a file and return its rows and quarantined records."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(folder, name, **fields)


def content(row: Row) -> Row:
    return {key: row[key] for key in ("text", "messages", "rejected") if row.get(key) is not None}


def build_dataset(folder: Path, out: str, stage: Dataset, seed: int = 0) -> tuple[StageResult, Path]:
    path = folder / out / "out"
    path.mkdir(parents=True)
    context = stage_context(stage, {}, path.parent, name="docs", seed=seed, folder=folder, out=path)
    return run_dataset(context), path


def quarantine_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]

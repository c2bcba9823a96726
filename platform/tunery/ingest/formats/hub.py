"""Read datasets on the Hugging Face Hub (`hub:org/name`), and folders saved by Datasets (`save_to_disk`).

A hub dataset is streamed with the Datasets library: it requires a network connection and is not copied to the local
disk. A saved dataset is read as Arrow files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tunery.ingest.filesystem import CorruptFile, File, UnavailableFile, local_file
from tunery.ingest.formats.record import Record, table_row

PREFIX = "hub:"
HUB_TIMEOUT_S = 10
"""Timeout in seconds of a request for the metadata of a dataset."""


class AmbiguousDataset(ValueError):
    """The dataset needs another field to be set: `field`, with one of the values `known`."""

    def __init__(self, field: str, message: str, known: list[str]) -> None:
        super().__init__(field, message, known)  # pickle rebuilds the exception from these arguments
        self.field, self.message, self.known = field, message, known

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face Hub."""

    name: str
    """hub:org/name"""
    config: str | None
    split: str | None
    revision: str | None

    def identity(self) -> Any:
        """Return the commit hash of the revision. Raises UnavailableFile."""
        return _commit(self.name.removeprefix(PREFIX), self.revision)


@cache
def _commit(name: str, revision: str | None) -> str:
    """Return the commit of a revision. It is cached per process, so that the cache key and the rows are from the same
    commit."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S).sha)
    except Exception as error:
        # huggingface_hub raises its own errors, errors of httpx and OSError.
        raise UnavailableFile(f"`{PREFIX}{name}`: {_reason(error)}") from error


def hub_rows(dataset: HubDataset) -> Iterator[Record]:
    """Yield the rows as records, numbered from 1. Raises UnavailableFile without network or permission,
    AmbiguousDataset if a config or split must be selected."""
    for number, row in enumerate(raw_hub_rows(dataset), 1):
        yield Record(number, table_row(row))


def raw_hub_rows(dataset: HubDataset) -> Iterator[dict[str, Any]]:
    """Yield the rows with the types of the dataset. Raises the same errors as `hub_rows`."""
    commit = dataset.identity()
    yield from _streamed_rows(dataset.name.removeprefix(PREFIX), dataset.config, dataset.split, commit)


def streamed(name: str, config: str | None, split: str | None, revision: str | None) -> Iterator[Record]:
    """Stream rows as records. `name` is an argument of `datasets.load_dataset`: a hub name, or a folder of data
    files."""
    for number, row in enumerate(_streamed_rows(name, config, split, revision), 1):
        yield Record(number, table_row(row))


def _streamed_rows(name: str, config: str | None, split: str | None, revision: str | None) -> Iterator[dict[str, Any]]:
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    number = 0
    try:
        configs = datasets.get_dataset_config_names(name, revision=revision)
        if config is None and len(configs) > 1 and "default" not in configs:
            raise AmbiguousDataset("config", f"`{name}` has several configs", configs)
        if config is not None and config not in configs:
            raise AmbiguousDataset("config", f"`{name}` has no config `{config}`", configs)
        splits = datasets.load_dataset(name, config, revision=revision, streaming=True)
        split = select_split(name, split, list(splits))
        for row in splits[split]:
            number += 1
            yield row
    except (UnavailableFile, AmbiguousDataset):
        raise
    except Exception as error:
        raise UnavailableFile(f"`{PREFIX}{name}`, row {number + 1}: {_reason(error)}") from error


def select_split(name: str, split: str | None, known: list[str]) -> str:
    """Return the requested split, or the only one. Raises AmbiguousDataset."""
    if split is None and len(known) == 1:
        return known[0]
    if split is None:
        raise AmbiguousDataset("hub_split", f"`{name}` has several splits", known)
    if split not in known:
        raise AmbiguousDataset("hub_split", f"`{name}` has no split `{split}`", known)
    return split


def saved_files(path: Path, folder: Path, split: str | None) -> list[File] | None:
    """Return the Arrow files of a saved dataset in order, or None for another folder. Raises AmbiguousDataset,
    CorruptFile."""
    splits = _json(path / "dataset_dict.json")
    if splits is not None:
        path = path / select_split(path.name, split, [str(name) for name in splits.get("splits", [])])
    state = _json(path / "state.json")
    if state is None or "_data_files" not in state:
        return None
    return [local_file(path / str(file["filename"]), folder) for file in state["_data_files"]]


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"`{path.name}` can't be read: {error}") from error
    return parsed if isinstance(parsed, dict) else None


def _reason(error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return "HF_HUB_OFFLINE is set, so the hub is not queried"
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return "no network: the host's name can't be resolved" if "Name or service not known" in text else text

"""W&B's own files of a run, read back: which rows of its history are stored, and whether its end is.

A run has one file for each time that it was opened, `<folder>/[offline-]run-<time>-<id>/run-<id>.wandb`. In wandb
0.31 that is a LevelDB log of protobuf records: 7 bytes of header, then blocks of 32 KiB. A record is one or more
chunks, each a checksum, a length, a type and the data; no chunk crosses the end of a block. A writer that is killed
stops anywhere in it, up to a flush interval behind what it was given.

`wandb sync` uploads the files of one run in the order of their beginning, as one run. Each row has a `_step` that has
to grow from row to row, over all files: `History` numbers the rows, and leaves out what is stored.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER_BYTES = 7
BLOCK_BYTES = 32_768
CHUNK_HEADER = struct.Struct("<IHB")
COMPLETE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
X_AXES = ("step", "rows")
"""Columns that stand in every row of a curve, so that its metrics can be drawn over them."""

Key = tuple[Any, str]
"""A metric at a step of its x-axis; of what has no x-axis, None and its name."""


@dataclass(frozen=True)
class Row:
    """A row of a run's history, without the values of its metrics."""

    step: int
    """W&B's `_step`."""
    keys: frozenset[Key]


class History:
    """Numbers the rows of one W&B run, each metric of a step once.

    `stored`: the rows that the run's earlier files have. `uploaded`: how many rows the server has, where it was asked;
    then what the files have beyond that never arrived and is written again, and rows up to there are not written again
    even if the files lack them (a row may be uploaded before it is flushed to disk).

    The first value of a metric at a step stays, since W&B can't replace it: a training that resumes from a checkpoint
    logs the steps after it a second time, with the same values.
    """

    def __init__(self, stored: Sequence[Row] = (), uploaded: int | None = None) -> None:
        known = stored if uploaded is None else stored[:uploaded]
        self._keys = {key for row in known for key in row.keys}
        self._next = max((len(known), *(row.step + 1 for row in known)))
        self._uploaded = uploaded or 0

    def add(self, values: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """The row's `_step` and what it adds, or None where it adds nothing."""
        names = {name for step, name in keys_of(values) if (step, name) not in self._keys}
        if not any(map(_is_axis, values)):  # wandb adds the x-axis as it is then
            names -= {name for _, name in self._keys}
        if not names:
            return None
        self._keys |= keys_of(values)
        step, self._next = self._next, self._next + 1
        return None if step < self._uploaded else (step, {k: v for k, v in values.items() if k in names or _is_axis(k)})

    def append(self) -> int:
        """The `_step` of a row that is written whatever the run has already."""
        step = max(self._next, self._uploaded)
        self._next = step + 1
        return step


def keys_of(values: Mapping[str, Any]) -> frozenset[Key]:
    """What a row of these columns says: its metrics, each at its step. W&B's own columns begin with `_`."""
    return frozenset(
        (_step_of(name, values), name) for name in values if not _is_axis(name) and not name.startswith("_")
    )


def stored_rows(folder: Path, id: str) -> list[Row]:
    """Rows of all files of the run `id` under W&B's folder, in the order in which they were written."""
    found: list[Row] = []
    for path in run_files(folder, id):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                found.append(_row(record.history))
    return found


def exit_codes(folder: Path) -> dict[str, int | None]:
    """By id of the runs that have a file under W&B's folder: exit code in the last one, None where that has none."""
    codes: dict[str, int | None] = {}
    for path in run_files(folder):
        id = path.stem.removeprefix("run-")
        codes[id] = None
        for record in read_records(path):
            if record.WhichOneof("record_type") == "exit":
                codes[id] = record.exit.exit_code
    return codes


def repair_files(folder: Path) -> None:
    """Makes what killed writers left behind fit for `wandb sync`. Call while nobody writes.

    wandb 0.31 refuses to upload any run of a folder where one file has no run in it (killed right after it was opened),
    and the later files of a run where an earlier one ends within a record. The first is deleted, the second cut off
    after its last record: neither loses anything that could be read.
    """
    for path in run_files(folder):
        data = path.read_bytes()
        ends = [end for end, _ in _records(data)]
        if not ends:
            shutil.rmtree(path.parent)
        elif ends[-1] < len(data):
            with path.open("r+b") as file:
                file.truncate(ends[-1])


def run_files(folder: Path, id: str = "*") -> list[Path]:
    """The files of a run, or of all runs, oldest first."""
    # The folder's name has the time of the beginning, in seconds; where two are alike the file's own time decides.
    paths = folder.glob(f"*run-*/run-{id}.wandb")
    return sorted(paths, key=lambda path: (path.parent.name.removeprefix("offline-"), path.stat().st_mtime))


def read_records(path: Path) -> Iterator[Any]:
    """The file's records (`wandb.proto.wandb_internal_pb2.Record`) up to the first that is damaged or incomplete."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _, data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        yield record


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Where each record ends, and its bytes."""
    position, parts = HEADER_BYTES, b""
    while position + CHUNK_HEADER.size <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_HEADER.size:
            position += left
            continue
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, position)
        begin = position + CHUNK_HEADER.size
        position = begin + length
        if kind not in (COMPLETE, FIRST, MIDDLE, LAST) or position > len(data):
            return
        if zlib.crc32(data[begin - 1 : position]) != checksum:  # of the type and the data
            return
        parts += data[begin:position]
        if kind in (COMPLETE, LAST):
            yield position, parts
            parts = b""


def _row(history: Any) -> Row:
    names: dict[str, Any] = {}
    for item in history.item:
        name = item.key or item.nested_key[0]
        names[name] = json.loads(item.value_json) if _is_axis(name) or name == "_step" else None
    return Row(int(names.get("_step") or 0), keys_of(names))


def _step_of(name: str, values: Mapping[str, Any]) -> Any:
    while "/" in name:
        name = name.rpartition("/")[0]
        if f"{name}/step" in values:
            return values[f"{name}/step"]
    return values.get("step")


def _is_axis(name: str) -> bool:
    return name.rpartition("/")[2] in X_AXES

"""Reads W&B's local files of a run: which rows of its history are stored, and its exit code.

A run has a file for each time it was opened, `<folder>/[offline-]run-<time>-<id>/run-<id>.wandb`. In wandb 0.31 this
is a LevelDB log of protobuf records: a header of 7 bytes, then blocks of 32 KiB. A record is one or more chunks, each
with a checksum, a length, a type and the data; no chunk crosses the end of a block. If the writer is killed, the file
may end at any byte, up to a flush interval before the last record.

`wandb sync` uploads the files of a run in the order in which they were opened, as one run. The `_step` of the rows has
to increase across all files: `History` numbers the rows and skips those that are stored.
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
"""Columns of every row of a curve, which W&B uses as x-axes."""

Key = tuple[Any, str]
"""(step on its x-axis, metric); the step is None for values without an x-axis."""


@dataclass(frozen=True)
class Row:
    """A row of a run's history, without the values of its metrics."""

    step: int
    """W&B's `_step`."""
    keys: frozenset[Key]


class History:
    """Numbers the rows of a W&B run, and passes each metric at each step only once.

    `stored`: rows in the run's earlier files. `uploaded`: number of rows on the server, if it was queried; stored rows
    beyond it never arrived and are written again, and rows up to it are not written again even if no file has them (a
    row may be uploaded before it is flushed to disk).

    The first value of a metric at a step is final, because W&B cannot replace it: a training that resumes from a
    checkpoint logs the following steps a second time, with the same values.
    """

    def __init__(self, stored: Sequence[Row] = (), uploaded: int | None = None) -> None:
        known = stored if uploaded is None else stored[:uploaded]
        self._keys = {key for row in known for key in row.keys}
        self._next = max((len(known), *(row.step + 1 for row in known)))
        self._uploaded = uploaded or 0

    def add(self, values: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Return the row's `_step` and its new values, or None if all of them are stored."""
        names = {name for step, name in keys_of(values) if (step, name) not in self._keys}
        if not any(map(_is_axis, values)):  # wandb adds the current value of the x-axis
            names -= {name for _, name in self._keys}
        if not names:
            return None
        self._keys |= keys_of(values)
        step, self._next = self._next, self._next + 1
        return None if step < self._uploaded else (step, {k: v for k, v in values.items() if k in names or _is_axis(k)})

    def append(self) -> int:
        """Return the `_step` of a row that is always written."""
        step = max(self._next, self._uploaded)
        self._next = step + 1
        return step


def keys_of(values: Mapping[str, Any]) -> frozenset[Key]:
    """The metrics of a row, each with its step. Columns that begin with `_` are W&B's own."""
    return frozenset(
        (_step_of(name, values), name) for name in values if not _is_axis(name) and not name.startswith("_")
    )


def stored_rows(folder: Path, id: str) -> list[Row]:
    """History rows in all files of the run `id` in W&B's folder, in the order in which they were written."""
    rows: list[Row] = []
    for path in run_files(folder, id):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                rows.append(_row(record.history))
    return rows


def exit_codes(folder: Path) -> dict[str, int | None]:
    """Exit code in the last file of each run in W&B's folder, by run id; None if that file has no exit record."""
    codes: dict[str, int | None] = {}
    for path in run_files(folder):
        id = path.stem.removeprefix("run-")
        codes[id] = None
        for record in read_records(path):
            if record.WhichOneof("record_type") == "exit":
                codes[id] = record.exit.exit_code
    return codes


def repair_files(folder: Path) -> None:
    """Repair files of killed writers so that `wandb sync` accepts them. Call it only while no process writes.

    wandb 0.31 does not upload any run of a folder in which one file has no record (its writer was killed right after
    opening it), nor the later files of a run whose earlier file ends within a record. The first kind is deleted, the
    second truncated after its last complete record; no readable data is lost.
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
    # The folder's name has its time of creation in seconds; the modification time breaks ties.
    paths = folder.glob(f"*run-*/run-{id}.wandb")
    return sorted(paths, key=lambda path: (path.parent.name.removeprefix("offline-"), path.stat().st_mtime))


def read_records(path: Path) -> Iterator[Any]:
    """Yield the file's records (`wandb.proto.wandb_internal_pb2.Record`) up to the first corrupt or incomplete one."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _, data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        yield record


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the end offset and the bytes of each record."""
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

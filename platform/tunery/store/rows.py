"""Rows: one schema for texts, conversations, preference pairs, unpaired preferences and prompts, in Parquet shards.

    id        16 hex digits: hash of the normalised content (text, messages, rejected, label, tools)
    text      plain text; null in other formats
    messages  conversation whose last message is the response (a prompt has none); null for plain text
    rejected  rejected response of a preference pair; null in other formats
    label     of an unpaired preference: whether the response is desirable; null in other formats
    tools     tools that the assistant may call: JSON list in OpenAI's format, or null
    group     rows of a group stay in one split (the documented object; the first user message)
    source    file (with the sheet of a workbook), hub dataset or builtin corpus
    line      1-based line (row of a sheet; number of a record in .json, .parquet, .arrow and on the hub) in the source
    injected_corruption
              kind of corruption, "" for none, null if unknown. Filter evaluation reads it, scorers never do.

A message has these fields; all except role and content may be null:

    role               system, user, assistant or tool
    content            text; "" where an assistant only reasons or calls tools, or a tool returned nothing
    tool_calls         of an assistant: JSON list of calls in OpenAI's format, each with its `id` if the source has one
    reasoning_content  of an assistant: the reasoning before its content
    weight             of an assistant: loss weight, finite and >= 0; null means 1, and 0 excludes it from the loss
    name               of a tool: the function that returned the content; of other roles: the speaker
    tool_call_id       of a tool: the `id` of the call that it answers

A stage that outputs rows writes `rows/part-00000.parquet` and so on. Shard boundaries depend only on the rows, so the
files do not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Row = dict[str, Any]
RowFormat = Literal["text", "conversation", "preference", "rated", "prompt"]


class Message(TypedDict):
    role: str
    content: str
    tool_calls: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    weight: NotRequired[float | None]
    name: NotRequired[str | None]
    tool_call_id: NotRequired[str | None]


MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.string()),
            ("reasoning_content", pa.string()),
            ("weight", pa.float64()),
            ("name", pa.string()),
            ("tool_call_id", pa.string()),
        ]
    )
)
OPTIONAL_MESSAGE_FIELDS = ("tool_calls", "reasoning_content", "weight", "name", "tool_call_id")
"""All except role and content, in schema order."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("messages", MESSAGES),
        ("rejected", MESSAGES),
        ("label", pa.bool_()),
        ("tools", pa.string()),
        ("group", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("injected_corruption", pa.string()),
    ]
)
CONTENT = ["text", "messages", "tools"]
"""The columns that become tokens."""

SHARD = 1024
"""Number of rows in each of the first 64 shards. A shard is also one task of a scorer, so small shards spread few rows
over all workers. The next 64 shards have 4 times as many rows, later ones 16 times: 100 million rows are about 6,000
files."""
SHARD_BYTES = 32 << 20
"""Maximum content of a shard, which bounds the memory of a worker. A single row may be larger."""


REVIEWED_DIR = "decided"
"""Folder in a review artifact with the reviewed rows; their `label` is whether the reviewer kept them."""


_SPACE = re.compile(r"(\s+)")
_NFC_PIECE = 256
"""Characters. NFC normalisation of a run of combining marks is quadratic in its length; real words are shorter."""


def row_id(row: Row) -> str:
    """Return the hash of the content in Unicode NFC, without trailing white space of messages."""
    content: list[Any] = [
        _normal(row.get("text")),
        _all_fields(row.get("messages")),
        _all_fields(row.get("rejected")),
    ]
    # Added only if set, so that rows from before these columns existed keep their id.
    if row.get("label") is not None or row.get("tools") is not None:
        content.append([row.get("label"), row.get("tools")])
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def _all_fields(messages: list[Message] | None) -> list[list[Any]]:
    return [_message_fields(message) for message in messages or ()]


def _message_fields(message: Message) -> list[Any]:
    content: list[Any] = [message["role"], _normal(message["content"])]
    if calls := message.get("tool_calls"):
        content.append(calls)
    # Added only if set, so that rows from before these fields existed keep their id.
    optional: dict[str, Any] = {}
    if reasoning := _normal(message.get("reasoning_content")):
        optional["reasoning_content"] = reasoning
    if (weight := message.get("weight")) is not None:
        optional["weight"] = float(weight)
    optional |= {name: value for name in ("name", "tool_call_id") if (value := message.get(name))}
    if optional:
        content.append(optional)
    return content


def _normal(text: str | None) -> str | None:
    return None if text is None else nfc(text).rstrip()


def nfc(text: str) -> str:
    """Normalise to Unicode NFC, word by word, since characters do not compose across white space."""
    if text.isascii():
        return text
    pieces = (
        word[start : start + _NFC_PIECE] for word in _SPACE.split(text) for start in range(0, len(word), _NFC_PIECE)
    )
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


def row_format(row: Row) -> RowFormat:
    if row.get("rejected"):
        return "preference"
    if not row.get("messages"):
        return "text"
    if row.get("label") is not None:
        return "rated"
    return "conversation" if row["messages"][-1]["role"] == "assistant" else "prompt"


def write_rows(rows: Iterable[Row], folder: Path) -> int:
    """Write shards to `folder`/rows and return the number of rows. Only one shard is in memory at a time."""
    return write_tables(tables_of(rows), folder)


def write_tables(tables: Iterable[pa.Table], folder: Path) -> int:
    """Like `write_rows`, for tables of SCHEMA of any size. The files do not depend on the split into tables."""
    target = folder / "rows"
    target.mkdir(parents=True)
    boundaries = ShardBoundaries()
    shard: list[pa.Table] = []
    index = count = 0
    for table in tables:
        count += table.num_rows
        for start, stop, ends_shard in boundaries.split(content_bytes(table)):
            shard.append(table.slice(start, stop - start))
            if ends_shard:
                write_shard(shard, shard_path(target, index))
                shard, index = [], index + 1
    if shard or index == 0:
        write_shard(shard, shard_path(target, index))
    return count


class ShardBoundaries:
    """Splits rows, given by the bytes of their content, into shards."""

    def __init__(self) -> None:
        self._index = self._rows = self._size = 0

    def split(self, sizes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, bool]]:
        """Yield slices (start, stop, whether the shard ends after it) of the next rows. A slice may be empty."""
        ends = sizes.cumsum()
        start = 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            num_fitting = int(np.searchsorted(ends, before + SHARD_BYTES - self._size, side="right")) - start
            room = _shard_rows(self._index) - self._rows
            stop = start + min(room, max(num_fitting, 0 if self._rows else 1), len(ends) - start)
            self._rows += stop - start
            self._size += int(ends[stop - 1]) - before if stop > start else 0
            ends_shard = self._rows == _shard_rows(self._index) or stop < len(ends)
            yield start, stop, ends_shard
            if ends_shard:
                self._index, self._rows, self._size = self._index + 1, 0, 0
            start = stop


def _shard_rows(shard: int) -> int:
    return SHARD * (1 if shard < 64 else 4 if shard < 128 else 16)


def tables_of(rows: Iterable[Row]) -> Iterator[pa.Table]:
    """Yield the rows in tables of SCHEMA with at most SHARD rows."""
    pending: list[Row] = []
    size = 0
    for row in rows:
        pending.append({name: row.get(name) for name in SCHEMA.names})
        size += len(row.get("text") or "") + sum(
            len(message["content"]) + len(message.get("reasoning_content") or "")
            for message in row.get("messages") or ()
        )
        if len(pending) == SHARD or size > SHARD_BYTES // 4:
            yield pa.Table.from_pylist(pending, SCHEMA)
            pending, size = [], 0
    if pending:
        yield pa.Table.from_pylist(pending, SCHEMA)


def content_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return the number of bytes of text, content and reasoning per row."""
    total = np.zeros(table.num_rows, dtype=np.int64)
    total += _lengths(table["text"])
    for name in ("messages", "rejected"):
        messages = table[name].combine_chunks()
        counts = np.asarray(pc.fill_null(pc.list_value_length(messages), 0), dtype=np.int64)
        items = pc.list_flatten(messages)
        # Rows of older versions have no reasoning_content.
        fields = [name for name in ("content", "reasoning_content") if items.type.get_field_index(name) >= 0]
        lengths = sum(_lengths(pc.struct_field(items, name)) for name in fields)
        before = np.concatenate([[0], np.cumsum(lengths)])
        ends = counts.cumsum()
        total += before[ends] - before[ends - counts]
    return total


def _lengths(texts: Any) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.binary_length(texts), 0), dtype=np.int64)


def write_shard(tables: list[pa.Table], path: Path) -> None:
    # One chunk per column: Parquet pages end at chunk boundaries, and the bytes must not depend on the input tables.
    shard = pa.concat_tables(tables).combine_chunks() if tables else SCHEMA.empty_table()
    pq.write_table(shard, path)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def to_str_list(column: Any) -> list[str]:
    """Convert an Arrow column without nulls, such as `id`."""
    values: list[str] = column.to_pylist()
    return values


def shards(artifact: Path) -> list[Path]:
    """Return the shards in order: part-99999 before part-100000."""
    return sorted((artifact / "rows").glob("part-*.parquet"), key=lambda path: int(path.stem.removeprefix("part-")))


def read_rows(artifact: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """Yield all rows of an artifact in order. Only one shard is in memory at a time."""
    for shard in shards(artifact):
        yield from pq.read_table(shard, columns=columns).to_pylist()


def count_rows(artifact: Path) -> int:
    return sum(int(pq.read_metadata(shard).num_rows) for shard in shards(artifact))

"""The row: one schema for texts, conversations, preference pairs, rated answers and prompts, in Parquet shards.

    id        16 hex digits: hash of the normalised content (text, messages, rejected, label, tools)
    text      of a plain text, else null
    messages  the conversation, its last turn the answer (none in a prompt), else null
    rejected  the worse answer of a preference pair, else null
    label     of a rated answer: whether it is wanted, else null
    tools     tools that the assistant may call: JSON text of a list, as OpenAI has it, else null
    group     what must not straddle splits (the documented object; the first user turn)
    source    file (of a workbook with its sheet), hub dataset or builtin corpus
    line      1-based line (row of a sheet; number of a record in .json, .parquet, .arrow and on the hub) in the source
    planted   kind of planted damage, "" for none, null when unknown. Only judges read it, never scorers.

A turn has these fields, of which all but role and content may be null:

    role               system, user, assistant or tool
    content            text; "" where an assistant only reasons or calls tools, or a tool returned nothing
    tool_calls         of an assistant: JSON text of OpenAI's list of calls, each with its `id` where the source has one
    reasoning_content  of an assistant: the reasoning that precedes its content
    weight             of an assistant: weight of its loss, finite and >= 0; null is the default 1, and 0 is not trained
    name               of a tool: the function that returned the content; of other roles the speaker
    tool_call_id       of a tool: the `id` of the call that it answers

A stage of rows writes `rows/part-00000.parquet` and so on. Where a shard ends depends on the rows alone, so the same
rows make the same files whatever the number of workers.
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


class Turn(TypedDict):
    role: str
    content: str
    tool_calls: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    weight: NotRequired[float | None]
    name: NotRequired[str | None]
    tool_call_id: NotRequired[str | None]


TURNS = pa.list_(
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
OPTIONAL_TURN_FIELDS = ("tool_calls", "reasoning_content", "weight", "name", "tool_call_id")
"""All but role and content, in the order of the schema."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("messages", TURNS),
        ("rejected", TURNS),
        ("label", pa.bool_()),
        ("tools", pa.string()),
        ("group", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("planted", pa.string()),
    ]
)
CONTENT = ["text", "messages", "tools"]
"""The columns that become tokens."""

SHARD = 1024
"""Rows in each of the first 64 shards: also the unit of work of a scorer, so that few rows spread over workers too.
The next 64 have four times as many and all others sixteen times, so that 100 million rows are about 6,000 files."""
SHARD_BYTES = 32 << 20
"""Content at which a shard ends before it has its rows: what a worker holds at once. A single row may be larger."""


REVIEWED_DIR = "decided"
"""In a review's artifact: a folder with the rows that a person decided on, their `label` whether they are kept."""


_SPACE = re.compile(r"(\s+)")
_NFC_PIECE = 256
"""Characters. Normalising a run of combining marks takes time quadratic in its length; no real word is so long."""


def row_id(row: Row) -> str:
    """Same content, same id: Unicode NFC, trailing white space of each turn dropped."""
    content: list[Any] = [_normal(row.get("text")), _turns(row.get("messages")), _turns(row.get("rejected"))]
    # Rows without them keep the id that they had before there were such columns.
    if row.get("label") is not None or row.get("tools") is not None:
        content.append([row.get("label"), row.get("tools")])
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def _turns(turns: list[Turn] | None) -> list[list[Any]]:
    return [_turn(turn) for turn in turns or ()]


def _turn(turn: Turn) -> list[Any]:
    content: list[Any] = [turn["role"], _normal(turn["content"])]
    if calls := turn.get("tool_calls"):
        content.append(calls)
    # By name and only where they are set: turns without them keep the id that they had before there were such fields.
    newer: dict[str, Any] = {}
    if reasoning := _normal(turn.get("reasoning_content")):
        newer["reasoning_content"] = reasoning
    if (weight := turn.get("weight")) is not None:
        newer["weight"] = float(weight)
    newer |= {name: value for name in ("name", "tool_call_id") if (value := turn.get(name))}
    if newer:
        content.append(newer)
    return content


def _normal(text: str | None) -> str | None:
    return None if text is None else nfc(text).rstrip()


def nfc(text: str) -> str:
    """In Unicode NFC, word by word: nothing composes across white space."""
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
    """Write shards below `folder`/rows; returns the number of rows. Streams: one shard in memory at a time."""
    return write_tables(tables_of(rows), folder)


def write_tables(tables: Iterable[pa.Table], folder: Path) -> int:
    """The same for tables of SCHEMA of any size, such as filtered shards: the same rows make the same files."""
    target = folder / "rows"
    target.mkdir(parents=True)
    shard: list[pa.Table] = []
    index = count = rows = size = 0
    for table in tables:
        count += table.num_rows
        sizes = _content_bytes(table).cumsum()
        start = 0
        while start < table.num_rows:
            before = int(sizes[start - 1]) if start else 0
            fitting = int(np.searchsorted(sizes, before + SHARD_BYTES - size, side="right")) - start
            taken = min(_rows_in(index) - rows, max(fitting, 0 if rows else 1), table.num_rows - start)
            shard.append(table.slice(start, taken))
            start, rows = start + taken, rows + taken
            size += int(sizes[start - 1]) - before if taken else 0
            if rows == _rows_in(index) or start < table.num_rows:
                _write_shard(shard, target, index)
                shard, index, rows, size = [], index + 1, 0, 0
    if rows or count == 0:
        _write_shard(shard, target, index)
    return count


def _rows_in(shard: int) -> int:
    return SHARD * (1 if shard < 64 else 4 if shard < 128 else 16)


def tables_of(rows: Iterable[Row]) -> Iterator[pa.Table]:
    """The rows in tables of SCHEMA, of at most SHARD rows. Streams."""
    pending: list[Row] = []
    size = 0
    for row in rows:
        pending.append({name: row.get(name) for name in SCHEMA.names})
        size += len(row.get("text") or "") + sum(
            len(turn["content"]) + len(turn.get("reasoning_content") or "") for turn in row.get("messages") or ()
        )
        if len(pending) == SHARD or size > SHARD_BYTES // 4:
            yield pa.Table.from_pylist(pending, SCHEMA)
            pending, size = [], 0
    if pending:
        yield pa.Table.from_pylist(pending, SCHEMA)


def _content_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """Bytes of text, content and reasoning of each row."""
    total = np.zeros(table.num_rows, dtype=np.int64)
    total += _lengths(table["text"])
    for name in ("messages", "rejected"):
        turns = table[name].combine_chunks()
        counts = np.asarray(pc.fill_null(pc.list_value_length(turns), 0), dtype=np.int64)
        items = pc.list_flatten(turns)
        # Rows that an older version wrote have no reasoning.
        fields = [name for name in ("content", "reasoning_content") if items.type.get_field_index(name) >= 0]
        lengths = sum(_lengths(pc.struct_field(items, name)) for name in fields)
        before = np.concatenate([[0], np.cumsum(lengths)])
        ends = counts.cumsum()
        total += before[ends] - before[ends - counts]
    return total


def _lengths(texts: Any) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.binary_length(texts), 0), dtype=np.int64)


def _write_shard(tables: list[pa.Table], target: Path, index: int) -> None:
    # One chunk a column: pages end where chunks do, and bytes shall not depend on the tables that rows came in.
    whole = pa.concat_tables(tables).combine_chunks() if tables else SCHEMA.empty_table()
    pq.write_table(whole, target / f"part-{index:05d}.parquet")


def to_str_list(column: Any) -> list[str]:
    """An Arrow column without nulls, such as `id`."""
    found: list[str] = column.to_pylist()
    return found


def shards(artifact: Path) -> list[Path]:
    return sorted((artifact / "rows").glob("part-*.parquet"))


def read_rows(artifact: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """All rows of an artifact in their order, a shard in memory at a time."""
    for shard in shards(artifact):
        yield from pq.read_table(shard, columns=columns).to_pylist()


def count_rows(artifact: Path) -> int:
    return sum(int(pq.read_metadata(shard).num_rows) for shard in shards(artifact))

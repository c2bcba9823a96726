"""The row: one schema for texts, conversations, preference pairs and prompts, in Parquet shards.

    id        16 hex digits: hash of the normalised content (text, messages, rejected)
    text      of a plain text, else null
    messages  the conversation, its last turn the answer (none in a prompt), else null
    rejected  the worse answer of a preference pair, else null
    group     what must not straddle splits (the documented object; the first user turn)
    source    file or builtin corpus
    line      1-based line (jsonl) or index (json) in the source
    planted   kind of planted damage, "" for none, null when unknown. Only judges read it, never scorers.

A stage of rows writes `rows/part-00000.parquet` and so on. The size of shards depends on the number of rows alone, so
the same rows make the same files whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
Shape = Literal["text", "conversation", "preference", "prompt"]

_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("messages", _TURNS),
        ("rejected", _TURNS),
        ("group", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("planted", pa.string()),
    ]
)
SHARD = 1024
"""Rows in a shard: also the unit of work of a scorer."""


def row_id(row: Row) -> str:
    """Same content, same id: Unicode NFC, trailing white space of each turn dropped."""
    content = [
        _normal(row.get("text")),
        [[turn["role"], _normal(turn["content"])] for turn in row.get("messages") or ()],
        [[turn["role"], _normal(turn["content"])] for turn in row.get("rejected") or ()],
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def _normal(text: str | None) -> str | None:
    return None if text is None else unicodedata.normalize("NFC", text).rstrip()


def shape_of(row: Row) -> Shape:
    if row.get("rejected"):
        return "preference"
    if not row.get("messages"):
        return "text"
    return "conversation" if row["messages"][-1]["role"] == "assistant" else "prompt"


def write_rows(rows: Iterable[Row], folder: Path) -> int:
    """Write shards below `folder`/rows; returns the number of rows. Streams: one shard in memory at a time."""
    target = folder / "rows"
    target.mkdir(parents=True)
    shard: list[Row] = []
    count = 0
    for row in rows:
        shard.append(row)
        count += 1
        if len(shard) == SHARD:
            _write_shard(shard, target)
            shard = []
    if shard or count == 0:
        _write_shard(shard, target)
    return count


def _write_shard(rows: list[Row], target: Path) -> None:
    index = sum(1 for _ in target.iterdir())
    full = [{name: row.get(name) for name in SCHEMA.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, SCHEMA), target / f"part-{index:05d}.parquet")


def write_tables(tables: Iterable[pa.Table], folder: Path) -> int:
    """The same from tables of rows, which do not pass through Python; returns the number of rows."""
    target = folder / "rows"
    target.mkdir(parents=True)
    waiting, count, index = SCHEMA.empty_table(), 0, 0
    for table in tables:
        waiting = pa.concat_tables([waiting, table.select(SCHEMA.names).cast(SCHEMA)])
        count += table.num_rows
        while waiting.num_rows >= SHARD:
            pq.write_table(waiting.slice(0, SHARD).combine_chunks(), target / f"part-{index:05d}.parquet")
            waiting, index = waiting.slice(SHARD), index + 1
    if waiting.num_rows or not index:
        pq.write_table(waiting.combine_chunks(), target / f"part-{index:05d}.parquet")
    return count


def strings(column: Any) -> list[str]:
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

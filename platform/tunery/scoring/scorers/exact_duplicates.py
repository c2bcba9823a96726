"""Exact duplicates: how many rows before this one have the same content.

Sketches are 8 bytes a row (a hash of the content: that two of 100 M rows share one by chance has odds of 1 in 4,000).
They are counted through files parted by hash, some 1 M rows in memory at a time, in two passes over 16 bytes a row: 3.2
GB of files for 100 M rows. A content that stands in m rows is counted in one piece, which takes some 64 m bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from tunery.scoring.scorers.external_groupby import (
    RECORDS,
    PartitionFiles,
    RowSignatures,
    block_numbers,
    part_of,
    run_starts,
)
from tunery.scoring.scorers.registry import Columns
from tunery.scoring.scorers.texts import normalize, select_text
from tunery.spec import Duplicates
from tunery.store.rows import Row, nfc


class DuplicatesScorer:
    def __init__(self, spec: Duplicates, records: int = RECORDS) -> None:
        self._of, self._exact, self._records = spec.of, spec.duplicates == "exact", records

    def sketch(self, rows: Sequence[Row]) -> Columns:
        """key: 8 bytes; None where there is no content."""
        return {"key": [self._key(row) for row in rows]}

    def _key(self, row: Row) -> bytes | None:
        content = self._content(row)
        return blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest() if content else None

    def _content(self, row: Row) -> str:
        if self._of != "row":
            text = select_text(row, self._of) or ""
            return nfc(text).rstrip() if self._exact else normalize(text)
        if self._exact:
            return str(row["id"])
        turns = [*(row.get("messages") or ()), {"role": "rejected", "content": ""}, *(row.get("rejected") or ())]
        return "\n".join(
            [
                normalize(row.get("text") or ""),
                *(f"{turn['role']}: {normalize(turn['content'] or '')}" for turn in turns),
            ]
        )

    def resolve(self, sketches: RowSignatures, work: Path) -> Iterator[Columns]:
        """score: 0 for the first of equal rows, 1 for the second and so on; NaN where there is no content."""
        blocks = sketches.blocks(self._records)
        parts = 1 + sum(block.rows for block in blocks) // self._records
        by_key = PartitionFiles(work / "keys", {"key": "<u8", "row": "<u8"}, self._records)
        for first, sketch in sketches.by_shard(blocks, ["key"]):
            there = np.array([key is not None for key in sketch["key"]], dtype=np.bool_)
            keys = np.frombuffer(b"".join(filter(None, sketch["key"])), dtype="<u8")
            by_key.append(part_of(keys, parts), key=keys, row=first + np.flatnonzero(there))

        by_row = PartitionFiles(work / "ranks", {"row": "<u8", "rank": "<u8"}, self._records)
        for number in range(parts):
            records = by_key.read(number)
            records = records[np.argsort(records["key"], kind="stable")]  # rows come in their order
            ranks = np.arange(len(records)) - run_starts(records["key"])
            by_row.append(block_numbers(blocks, records["row"]), row=records["row"], rank=ranks)
            by_key.drop(number)

        for number, block in enumerate(blocks):
            scores = np.full(block.rows, math.nan)
            found = by_row.read(number)
            scores[found["row"].astype(np.int64) - block.first] = found["rank"]
            by_row.drop(number)
            start = 0
            for _, count in block.shards:
                yield {"score": scores[start : start + count].tolist()}
                start += count

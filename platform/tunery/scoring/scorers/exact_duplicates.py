"""Exact duplicates: the number of earlier rows with the same content.

Signatures are 8-byte hashes of the content; the probability that any two of 100 M different rows share one is 1 in
4,000. Rows are counted in files partitioned by hash, about 1 M rows in memory at a time, in two passes over 16 bytes a
row: 3.2 GB of files for 100 M rows. The m rows of one content are always in one partition, which takes about 64 m bytes
of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from tunery.scoring.scorers.external_groupby import (
    MAX_RECORDS,
    PartitionFiles,
    RowSignatures,
    group_indices,
    partition_of,
    run_starts,
)
from tunery.scoring.scorers.interfaces import Columns
from tunery.scoring.scorers.texts import normalize, select_text
from tunery.spec import Duplicates
from tunery.store.rows import Row, nfc


class DuplicatesScorer:
    def __init__(self, spec: Duplicates, max_records: int = MAX_RECORDS) -> None:
        self._of, self._exact, self._max_records = spec.of, spec.duplicates == "exact", max_records

    def compute_signatures(self, rows: Sequence[Row]) -> Columns:
        """Return "key", 8 bytes per row; None for a row without content."""
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
        messages = [*(row.get("messages") or ()), {"role": "rejected", "content": ""}, *(row.get("rejected") or ())]
        return "\n".join(
            [
                normalize(row.get("text") or ""),
                *(f"{message['role']}: {normalize(message['content'] or '')}" for message in messages),
            ]
        )

    def resolve(self, signatures: RowSignatures, work_dir: Path) -> Iterator[Columns]:
        """Yield "score": 0 for the first of several equal rows, 1 for the second, and so on; NaN without content."""
        groups = signatures.shard_groups(self._max_records)
        num_partitions = 1 + sum(group.rows for group in groups) // self._max_records
        by_key = PartitionFiles(work_dir / "keys", {"key": "<u8", "row": "<u8"}, self._max_records)
        for first, columns in signatures.by_shard(groups, ["key"]):
            has_key = np.array([key is not None for key in columns["key"]], dtype=np.bool_)
            keys = np.frombuffer(b"".join(filter(None, columns["key"])), dtype="<u8")
            by_key.append(partition_of(keys, num_partitions), key=keys, row=first + np.flatnonzero(has_key))

        by_row = PartitionFiles(work_dir / "ranks", {"row": "<u8", "rank": "<u8"}, self._max_records)
        for partition in range(num_partitions):
            records = by_key.read(partition)
            records = records[np.argsort(records["key"], kind="stable")]  # keeps the row order within a key
            ranks = np.arange(len(records)) - run_starts(records["key"])
            by_row.append(group_indices(groups, records["row"]), row=records["row"], rank=ranks)
            by_key.drop(partition)

        for number, group in enumerate(groups):
            scores = np.full(group.rows, math.nan)
            records = by_row.read(number)
            scores[records["row"].astype(np.int64) - group.first] = records["rank"]
            by_row.drop(number)
            start = 0
            for _, count in group.shards:
                yield {"score": scores[start : start + count].tolist()}
                start += count

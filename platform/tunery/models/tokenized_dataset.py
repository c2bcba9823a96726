"""Memory-mapped tokenised rows of one artifact, shared by all workers, trials and stages (token_cache.py builds them).

<store>/tokenized/<cache key>/
    tokens.bin        uint32, the concatenated sequences
    types.bin         uint8, token types; empty if the tokenizer returns none
    offsets.npy       int64 (sequences + 1): start of each sequence in tokens.bin
    spans.npy         int32 (spans, 2): start and end of loss tokens within their sequence
    span_offsets.npy  int64 (sequences + 1): start of each sequence's spans
    row_ids.npy       uint64 (sequences): id of each sequence's row
    labels.npy        int8 (sequences): the row's label, -1 without a label
    rows.arrow        the rows, in the order of their sequences, if the stage kind keeps rows
    unusable.jsonl    one line per row without a sequence: id, source, line, reason
    stats.json        row, sequence and token counts (`TokenStats`)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tunery.models.encode import Span, labels_of
from tunery.store.atomic_write import read_json
from tunery.store.rows import Row

Integers = npt.NDArray[np.int64]
"""Array of int64."""


@dataclass
class TokenStats:
    """Row, sequence and token counts of an artifact's rows."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    """Number of truncated rows."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Number of rows without a sequence, by reason."""
    dropped_reasoning: int = 0
    """Number of assistant messages whose reasoning the chat template does not render."""
    escaped_tokens: int = 0
    """Number of special tokens in the text of rows, encoded as ordinary text."""

    def add(self, other: TokenStats) -> None:
        """Add the counts of other rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def num_unusable(self) -> int:
        """Number of rows without a sequence."""
        return sum(self.unusable.values())


class TokenizedDataset:
    """The sequences of one artifact's rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: Integers = np.load(folder / "offsets.npy", mmap_mode="r")
        self._spans = np.load(folder / "spans.npy", mmap_mode="r")
        self._span_offsets: Integers = np.load(folder / "span_offsets.npy", mmap_mode="r")
        self.row_ids: npt.NDArray[np.uint64] = np.load(folder / "row_ids.npy", mmap_mode="r")
        """(sequences,) uint64, id of the row of each sequence."""
        self.row_labels: npt.NDArray[np.int8] = np.load(folder / "labels.npy", mmap_mode="r")
        """(sequences,) int8, label of the row of each sequence: 1, 0, or -1 without a label."""
        self.tokens: npt.NDArray[np.uint32] = _memmap(folder / "tokens.bin", np.uint32)
        """Token ids of all sequences, concatenated."""
        self._types: npt.NDArray[np.uint8] = _memmap(folder / "types.bin", np.uint8)
        self._rows = _RowFile(folder / "rows.arrow") if (folder / "rows.arrow").is_file() else None
        stats = json.loads((folder / "stats.json").read_text())
        self.stats = TokenStats(**{**stats, "unusable": Counter(stats["unusable"])})

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def lengths(self) -> Integers:
        """(sequences,) int64, number of tokens of each sequence."""
        return np.diff(self._offsets)

    @property
    def has_all_values(self) -> bool:
        """Whether the arrays have the lengths that the offsets and the counts imply: none was truncated."""
        return (
            len(self) == len(self.row_ids) == len(self.row_labels) == self.stats.sequences
            and len(self._span_offsets) == len(self._offsets)
            and len(self.tokens) == self._offsets[-1] == self.stats.tokens
            and len(self._types) in (0, len(self.tokens))
            and len(self._spans) == self._span_offsets[-1]
        )

    def ids(self, index: int) -> list[int]:
        """Return the token ids of a sequence."""
        ids: list[int] = self.tokens[self._offsets[index] : self._offsets[index + 1]].tolist()
        return ids

    def spans(self, index: int) -> list[Span]:
        """Return the spans of tokens that have a loss."""
        first, last = self._span_offsets[index], self._span_offsets[index + 1]
        return [(int(start), int(end)) for start, end in self._spans[first:last]]

    def labels(self, index: int) -> list[int]:
        """Return the token ids of a sequence, with -100 for tokens without a loss."""
        return labels_of(self.ids(index), self.spans(index))

    def loss_tokens(self, index: int) -> int:
        """Return the number of tokens that have a loss."""
        return sum(end - max(start, 1) for start, end in self.spans(index) if end > 1)

    def token_types(self, index: int) -> list[int] | None:
        """Return the token_type_ids of a sequence; None if the tokenizer returns none."""
        if not len(self._types):
            return None
        types: list[int] = self._types[self._offsets[index] : self._offsets[index + 1]].tolist()
        return types

    def row(self, index: int) -> Row:
        """Return the row of a sequence. Only if the RowEncoding keeps rows."""
        assert self._rows is not None, "the stage kind does not keep rows"
        return self._rows[index]

    def unusable_rows(self) -> Iterator[dict[str, Any]]:
        """Yield id, source, line and reason of each row without a sequence."""
        with (self.folder / "unusable.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def is_complete(folder: Path) -> bool:
    """Whether a folder has a tokenised dataset without truncated files."""
    stats = read_json(folder / "stats.json")
    if stats is None:
        return False
    try:
        dataset = TokenizedDataset(folder)
        num_unusable = (folder / "unusable.jsonl").read_bytes().count(b"\n")
    except (OSError, ValueError, EOFError):  # ValueError: that of numpy and pyarrow for truncated files
        return False
    return dataset.has_all_values and num_unusable == dataset.stats.num_unusable


def _memmap(file: Path, dtype: type[Any]) -> npt.NDArray[Any]:
    # An empty file can't be mapped.
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


class _RowFile:
    """Rows by index, in a memory-mapped Arrow file."""

    def __init__(self, file: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(file)))
        batches = [self._file.get_batch(number) for number in range(self._file.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    def __getitem__(self, index: int) -> Row:
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        row: Row = self._file.get_batch(batch).slice(int(index - self._starts[batch]), 1).to_pylist()[0]
        return row

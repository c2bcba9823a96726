"""Protocol of a writer of records, which each format implements, and the counts that all writers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunery.filter.originals import Original
from tunery.filter.source_columns import SourceColumns

AddedValues = Mapping[str, Any]
"""Added columns: pyarrow type or value by name. A row may have fewer."""


@dataclass
class WriteCounts:
    """Counts of an output file."""

    rows: int = 0
    escaped: int = 0
    """Number of texts with an added leading apostrophe, so that spreadsheets don't treat them as formulas."""
    replaced: int = 0
    """Number of texts in which characters that a workbook can't represent were replaced."""


class Writer(Protocol):
    def write(self, record: Original, added: AddedValues) -> None: ...


WriterFactory = Callable[[Path, SourceColumns, AddedValues, WriteCounts], AbstractContextManager[Writer]]
"""Opens a writer. Arguments: output path, columns of the sources, added columns with their types, counts to update."""

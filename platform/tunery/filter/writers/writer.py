"""What a writer of records is: the protocol that each format implements, and what all of them count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunery.filter.columns import SourceColumns
from tunery.filter.originals import Original

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that a spreadsheet takes for a formula
(https://owasp.org/www-community/attacks/CSV_Injection)."""

Added = Mapping[str, Any]
"""Further columns: name and pyarrow type, or name and value; a row may have fewer."""


@dataclass
class Written:
    """What became of an export."""

    rows: int = 0
    guarded: int = 0
    """Texts that have an apostrophe in front of them now, so that no spreadsheet takes them for a formula."""
    replaced: int = 0
    """Texts in which characters were replaced that a workbook can't hold."""


class Writer(Protocol):
    def write(self, record: Original, added: Added) -> None: ...


Open = Callable[[Path, SourceColumns, Added, Written], AbstractContextManager[Writer]]
"""The file to write, the sources' columns, the further columns with their types, and the counts to fill."""

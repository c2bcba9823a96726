"""The rows that examples are drawn from: at most MAX_EXAMPLES of them, picked by a hash of their ids.

They are a sample of all rows that may serve, in one pass over them and in bounded memory: 4,096 examples of at most
`max_chars` characters, some 20 MB. Of 100 million rows each example then stands before some 25,000 questions a shot;
that examples repeat is how few-shot prompts are made by hand as well.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tunery.augment.hash_stream import shuffled
from tunery.augment.heldout_rows import Heldout, flag_heldout
from tunery.augment.qa_pairs import QAPair, qa_pair_of

COLUMNS = ["id", "messages", "label", "tools", "group"]
MAX_EXAMPLES = 4096
TRIED = 64
"""Examples looked at for each that is wanted: a row that hardly any fits is not taken through the whole pool."""

Kind = tuple[str, bool]
"""Examples fit rows of their kind: what the system says, and whether the answer holds reasoning that is looked for."""


def read_pool(artifact: Path, heldout: Heldout, separator: str | None, longest: int, seed: int) -> FewShotPool:
    """From one pass over a stage's rows. Examples of more than `longest` characters are left out."""
    pool = FewShotPool()
    heap: list[tuple[int, str, QAPair]] = []
    ids: set[str] = set()
    for row, held in flag_heldout(artifact, heldout, COLUMNS):
        found = "held out" if held else qa_pair_of(row, separator)
        if isinstance(found, QAPair) and len(found.question) + len(found.answer) > longest:
            found = "longer than max_chars"
        if isinstance(found, str):
            pool.unfit[found] += 1
            continue
        pool.fit += 1
        order = -_order(found.id, seed)  # a heap gives its smallest: here the one to go first
        if found.id in ids or (len(heap) == MAX_EXAMPLES and order < heap[0][0]):
            continue
        ids.add(found.id)
        if len(heap) < MAX_EXAMPLES:
            heapq.heappush(heap, (order, found.id, found))
        else:
            ids.discard(heapq.heappushpop(heap, (order, found.id, found))[1])
    for _, _, example in sorted(heap, key=lambda item: (-item[0], item[1])):
        pool.add(example)
    return pool


@dataclass
class FewShotPool:
    fit: int = 0
    """Rows that may serve."""
    unfit: Counter[str] = field(default_factory=Counter)
    """The others, by reason."""
    _by_kind: defaultdict[Kind, list[QAPair]] = field(default_factory=lambda: defaultdict(list))

    def __len__(self) -> int:
        return sum(map(len, self._by_kind.values()))

    def add(self, example: QAPair) -> None:
        self._by_kind[example.system, example.final is not None].append(example)

    def draw(
        self, kind: Kind, shots: int, own: tuple[str, int], fits: Callable[[QAPair], bool], drawn: Iterator[int]
    ) -> list[QAPair]:
        """At most `shots` examples, no two of one group, none of them the row itself (`own`: its id and group) nor of
        its group, each of which `fits` when it is its turn."""
        found: list[QAPair] = []
        if shots == 0:
            return found
        examples = self._by_kind.get(kind, [])
        ids, groups = {own[0]}, {own[1]} - {0}
        for tried, index in enumerate(shuffled(len(examples), drawn)):
            if len(found) == shots or tried == TRIED * shots:
                break
            example = examples[index]
            if example.id not in ids and example.group not in groups and fits(example):
                found.append(example)
                ids.add(example.id)
                groups |= {example.group} - {0}
        return found


def _order(row_id: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"example {seed} {row_id}".encode(), digest_size=16).digest(), "big")

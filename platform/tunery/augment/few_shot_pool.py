"""The pool that few-shot examples are sampled from: at most MAX_EXAMPLES rows, chosen by a hash of their ids.

The pool is a sample of all usable rows, built in one pass and in bounded memory: 4,096 examples of at most `max_chars`
characters, about 20 MB. With 100 million rows, each example is used in about 25,000 prompts per shot; hand-written
few-shot prompts also repeat their examples.
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
MAX_TRIES_PER_SHOT = 64
"""Maximum number of examples tried per requested one, so that a row that fits few examples doesn't scan the pool."""

Kind = tuple[str, bool]
"""(system message, whether the answer contains reasoning). Examples are used only with rows of their kind."""


def read_pool(artifact: Path, heldout: Heldout, separator: str | None, max_chars: int, seed: int) -> FewShotPool:
    """Build the pool in one pass over the rows of a stage, without examples of more than `max_chars` characters."""
    pool = FewShotPool()
    heap: list[tuple[int, str, QAPair]] = []
    ids: set[str] = set()
    for row, is_heldout in flag_heldout(artifact, heldout, COLUMNS):
        example = "held out" if is_heldout else qa_pair_of(row, separator)
        if isinstance(example, QAPair) and len(example.question) + len(example.answer) > max_chars:
            example = "longer than max_chars"
        if isinstance(example, str):
            pool.unusable[example] += 1
            continue
        pool.num_usable += 1
        order = -_id_hash(example.id, seed)  # heapq is a min-heap, so the example to replace is on top
        if example.id in ids or (len(heap) == MAX_EXAMPLES and order < heap[0][0]):
            continue
        ids.add(example.id)
        if len(heap) < MAX_EXAMPLES:
            heapq.heappush(heap, (order, example.id, example))
        else:
            ids.discard(heapq.heappushpop(heap, (order, example.id, example))[1])
    for _, _, example in sorted(heap, key=lambda item: (-item[0], item[1])):
        pool.add(example)
    return pool


@dataclass
class FewShotPool:
    num_usable: int = 0
    """Number of rows usable as examples."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Number of other rows, by reason."""
    _by_kind: defaultdict[Kind, list[QAPair]] = field(default_factory=lambda: defaultdict(list))

    def __len__(self) -> int:
        return sum(map(len, self._by_kind.values()))

    def add(self, example: QAPair) -> None:
        self._by_kind[example.system, example.final is not None].append(example)

    def sample(
        self,
        kind: Kind,
        shots: int,
        exclude: tuple[str, int],
        fits: Callable[[QAPair], bool],
        random_numbers: Iterator[int],
    ) -> list[QAPair]:
        """Sample at most `shots` examples of different groups for which `fits` is true when they are tried.

        `exclude` is the id and group of the row itself; neither the row nor its group is sampled.
        """
        sampled: list[QAPair] = []
        if shots == 0:
            return sampled
        examples = self._by_kind.get(kind, [])
        ids, groups = {exclude[0]}, {exclude[1]} - {0}
        for num_tried, index in enumerate(shuffled(len(examples), random_numbers)):
            if len(sampled) == shots or num_tried == MAX_TRIES_PER_SHOT * shots:
                break
            example = examples[index]
            if example.id not in ids and example.group not in groups and fits(example):
                sampled.append(example)
                ids.add(example.id)
                groups |= {example.group} - {0}
        return sampled


def _id_hash(row_id: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"example {seed} {row_id}".encode(), digest_size=16).digest(), "big")

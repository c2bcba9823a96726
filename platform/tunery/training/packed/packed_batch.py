"""The tokens of one forward pass of a pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from tunery.models.packed_attention import Layout
from tunery.training.sequences import InMemorySequences, TrainingSequences

IGNORED = -100
"""A label that does not count."""


@dataclass(frozen=True)
class PackedBatch:
    """As many tokens of each member, padding included, one member after the other. On the CPU."""

    ids_bt: torch.Tensor
    places_n: torch.Tensor
    """Where, in the whole batch, the hidden state lies that predicts each counted token."""
    targets_n: torch.Tensor
    owners_n: torch.Tensor
    """Whose each of them is, in the order of the members."""
    layout: Layout | None
    """None where each row is a sequence of its own."""


def batch_of(
    chosen: Sequence[tuple[TrainingSequences | InMemorySequences, Sequence[int]]], beside: bool
) -> PackedBatch:
    """`chosen`: of each member some of its rows, beside each other (models/packed_attention.py) or below each other.

    Padded with token 0, which is never looked at.
    """
    lengths = [[int(data.lengths[row]) for row in rows] for data, rows in chosen]
    if beside:
        layout = Layout.of(lengths)
        ids = [list(chain.from_iterable(data.ids(row) for row in rows)) for data, rows in chosen]
        labels = [list(chain.from_iterable(_predicted(data.labels(row)) for row in rows)) for data, rows in chosen]
    else:
        layout, most = None, max(len(rows) for _, rows in chosen)
        ids = [sequence for data, rows in chosen for sequence in _filled([data.ids(row) for row in rows], most)]
        labels = [
            sequence
            for data, rows in chosen
            for sequence in _filled([_predicted(data.labels(row)) for row in rows], most)
        ]
    width = max(map(len, ids))
    ids_bt = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    labels_n = torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in labels]).flatten()
    found_n = (labels_n != IGNORED).nonzero().flatten()
    return PackedBatch(ids_bt, found_n - 1, labels_n[found_n], found_n // (len(labels_n) // len(chosen)), layout)


def _predicted(labels: Sequence[int]) -> list[int]:
    """Nothing predicts a row's first token."""
    return [IGNORED, *labels[1:]]


def _filled(rows: list[list[int]], most: int) -> list[list[int]]:
    return [*rows, *[[]] * (most - len(rows))]

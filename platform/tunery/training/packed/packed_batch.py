"""The token ids and labels of one forward pass of a pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from tunery.models.packed_attention import Layout
from tunery.training.sequences import InMemorySequences, TrainingSequences

IGNORED_LABEL = -100
"""Label of tokens without a loss, as in torch's cross_entropy."""


@dataclass(frozen=True)
class PackedBatch:
    """Rows of several members, one member after another, with the same number of tokens for each, including padding.
    Tensors are int64 on the CPU; n is the number of loss tokens."""

    ids_bt: torch.Tensor
    """(sequences, tokens), token ids."""
    state_indices_n: torch.Tensor
    """Index in the flattened `ids_bt` of the token before each loss token, whose hidden state predicts it."""
    targets_n: torch.Tensor
    """Ids of the loss tokens."""
    member_indices_n: torch.Tensor
    """Member of each loss token, as an index into the members of the batch."""
    layout: Layout | None
    """Boundaries of concatenated rows; None if each sequence is one row."""


def build_packed_batch(
    selection: Sequence[tuple[TrainingSequences | InMemorySequences, Sequence[int]]], concatenate: bool
) -> PackedBatch:
    """Build a batch from the selected rows of each member.

    selection: for each member its data and row indices. concatenate: the rows of a member form one sequence
    (models/packed_attention.py) instead of one sequence per row. Padding is token 0; it is never attended to and has no
    loss.
    """
    lengths = [[int(data.lengths[row]) for row in rows] for data, rows in selection]
    if concatenate:
        layout = Layout.of(lengths)
        ids = [list(chain.from_iterable(data.ids(row) for row in rows)) for data, rows in selection]
        labels = [
            list(chain.from_iterable(_without_first_label(data.labels(row)) for row in rows))
            for data, rows in selection
        ]
    else:
        layout, max_rows = None, max(len(rows) for _, rows in selection)
        ids = [
            sequence for data, rows in selection for sequence in _pad_rows([data.ids(row) for row in rows], max_rows)
        ]
        labels = [
            sequence
            for data, rows in selection
            for sequence in _pad_rows([_without_first_label(data.labels(row)) for row in rows], max_rows)
        ]
    width = max(map(len, ids))
    ids_bt = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    labels_n = torch.tensor([[*row, *[IGNORED_LABEL] * (width - len(row))] for row in labels]).flatten()
    loss_indices_n = (labels_n != IGNORED_LABEL).nonzero().flatten()
    member_indices_n = loss_indices_n // (len(labels_n) // len(selection))
    return PackedBatch(ids_bt, loss_indices_n - 1, labels_n[loss_indices_n], member_indices_n, layout)


def _without_first_label(labels: Sequence[int]) -> list[int]:
    """Return the labels without the first one: no hidden state of the row predicts its first token."""
    return [IGNORED_LABEL, *labels[1:]]


def _pad_rows(rows: list[list[int]], count: int) -> list[list[int]]:
    """Append empty rows up to `count` rows."""
    return [*rows, *[[]] * (count - len(rows))]

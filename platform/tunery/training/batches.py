"""Steps, batches and data order. The rows of a step depend on seed and global batch size alone.

How many workers share a step, and in how many micro batches, changes nothing but the order of additions: so a run
with other `compute` ends at the same losses, up to floating point.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunery.errors import RequestError
from tunery.models.tokenized_dataset import Integers
from tunery.spec import AUTO, Grpo, Rloo, Training
from tunery.spec.references import Auto

LARGEST_MICRO_BATCH = 4
"""Of `auto`: rows stand by length within a step, so that small micro batches are padded little, and workers that take
turns along that order get like loads. A GPU with room for more is better used with an explicit number."""


@dataclass(frozen=True)
class Batching:
    steps: int
    global_batch_size: int
    workers: int
    micro_batch_size: int
    accumulation: int
    """Micro batches per step and worker: global = workers x micro x accumulation."""


def plan_batches(
    rows: int, epochs: float, global_batch_size: int, workers: int, micro_batch_size: int | None
) -> Batching:
    """`micro_batch_size` None picks it. Raises RequestError when the global batch can't be shared out."""
    if global_batch_size % workers:
        raise RequestError(
            f"global_batch_size {global_batch_size} can't be split over {workers} workers",
            remedy=f"use a multiple of {workers}, or fewer workers",
        )
    share = global_batch_size // workers
    if micro_batch_size is None:
        micro_batch_size = max(size for size in range(1, min(share, LARGEST_MICRO_BATCH) + 1) if share % size == 0)
    if share % micro_batch_size:
        raise RequestError(
            f"micro_batch_size {micro_batch_size} does not divide a worker's share of {share} sequences a step",
            cause=f"global_batch_size {global_batch_size} over {workers} workers",
            remedy="use a divisor of the share, or micro_batch_size: auto",
        )
    steps = max(1, math.ceil(round(rows * epochs / global_batch_size, 9)))
    return Batching(steps, global_batch_size, workers, micro_batch_size, share // micro_batch_size)


def group_size(stage: Training[Any]) -> int:
    """Sequences that a step has of each row: answers that are drawn to a prompt."""
    return stage.group_size if isinstance(stage, Grpo | Rloo) else 1


def iterations(stage: Training[Any]) -> int:
    """Optimizer steps over the same sequences."""
    return stage.iterations if isinstance(stage, Grpo | Rloo) else 1


def plan_training(stage: Training[Any], rows: int, workers: int, micro_batch_size: int | Auto) -> Batching:
    """For a stage with no `auto` in it. `rows` are what `epochs` go over."""
    assert stage.epochs != AUTO, "resolved"
    assert stage.global_batch_size != AUTO, "resolved"
    micro = None if micro_batch_size == AUTO else micro_batch_size
    sequences = rows * group_size(stage)
    batching = plan_batches(sequences, stage.epochs, stage.global_batch_size, workers, micro)
    return replace(batching, steps=batching.steps * iterations(stage))


@dataclass(frozen=True)
class SequenceMixture:
    """Sources of sequences, one after the other in a SequenceSet, and how much of each is sampled."""

    sizes: tuple[int, ...]
    """Sequences of each."""
    weights: tuple[float, ...]
    """Their sum is 1."""


def data_order(
    lengths: Sequence[int] | Integers,
    steps: int,
    global_batch_size: int,
    seed: int,
    mixture: SequenceMixture | None = None,
) -> Integers:
    """steps x global_batch_size row indices: one shuffled epoch after another, no partial batch at their edges. Of a
    `mixture` each source has its share of every stretch of the order, to within a sequence, and epochs of its own.

    Within a step rows stand by length, longest first, so that micro batches are padded little and the one that needs
    most memory comes first.
    """
    needed = steps * global_batch_size
    if mixture is None:
        order = _shuffled_epochs(len(lengths), needed, random.Random(seed))
    else:
        order = _mixed(mixture, needed, seed)
    order_sb = order.reshape(steps, global_batch_size)
    by_length = np.lexsort((order_sb, -np.asarray(lengths)[order_sb]), axis=1)
    return np.take_along_axis(order_sb, by_length, axis=1).ravel()


def _shuffled_epochs(count: int, needed: int, shuffle: random.Random) -> Integers:
    epochs = []
    for _ in range(math.ceil(needed / count)):
        epoch = array("q", range(count))
        shuffle.shuffle(epoch)
        epochs.append(np.frombuffer(epoch, np.int64))
    return np.concatenate([np.zeros(0, np.int64), *epochs])[:needed]


def _mixed(mixture: SequenceMixture, needed: int, seed: int) -> Integers:
    """The n-th sequence of a source of weight w has its turn at (n + 1/2) / w."""
    times, indices, start = [], [], 0
    for number, (size, weight) in enumerate(zip(mixture.sizes, mixture.weights, strict=True)):
        count = min(needed, math.ceil(needed * weight) + 1) if weight and size else 0
        times.append((np.arange(count) + 0.5) / (weight or 1))
        indices.append(start + _shuffled_epochs(max(1, size), count, random.Random(f"{seed}-{number}")))
        start += size
    turns = np.argsort(np.concatenate(times), kind="stable")[:needed]
    order: Integers = np.concatenate(indices)[turns]
    return order


def evaluation_batches(
    lengths: Sequence[int] | Integers, size: int, rank: int, workers: int
) -> list[tuple[list[int], bool]]:
    """A worker's batches of row indices, rows of like length together, and whether a batch counts.

    Every worker has as many, because under ZeRO-3 each forward pass gathers weights from all: the last ones may have a
    batch that another has too, and that doesn't count.
    """
    indices: list[int] = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    real = len(batches)
    batches += [batches[0]] * (-real % workers)
    return [(batch, number < real) for number, batch in enumerate(batches)][rank::workers]


def at_even_steps(steps: int, times: int) -> list[int]:
    """`times` steps (fewer when there are fewer) spread evenly over 1..steps, the last one at the end."""
    return sorted({math.ceil(steps * (index + 1) / times) for index in range(times)})

"""Number of steps, batch sizes and data order. The rows of a step depend only on the seed and the global batch size.

The number of workers and the micro batch size change only the order of additions, so that runs with different `compute`
have the same losses up to floating-point rounding.
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
from tunery.spec import AUTO, Training
from tunery.spec.references import Auto

MAX_AUTO_MICRO_BATCH = 4
"""The largest micro batch size that `auto` picks. Rows are sorted by length within a step, so small micro batches need
little padding. Set an explicit size to use the memory of a large GPU."""


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
    """Plan steps and batch sizes; `micro_batch_size` None picks one. Raises RequestError if sizes are not divisible."""
    if global_batch_size % workers:
        raise RequestError(
            f"global_batch_size {global_batch_size} can't be split over {workers} workers",
            remedy=f"use a multiple of {workers}, or fewer workers",
        )
    share = global_batch_size // workers
    if micro_batch_size is None:
        micro_batch_size = max(size for size in range(1, min(share, MAX_AUTO_MICRO_BATCH) + 1) if share % size == 0)
    if share % micro_batch_size:
        raise RequestError(
            f"micro_batch_size {micro_batch_size} does not divide a worker's share of {share} sequences a step",
            cause=f"global_batch_size {global_batch_size} over {workers} workers",
            remedy="use a divisor of the share, or micro_batch_size: auto",
        )
    steps = max(1, math.ceil(round(rows * epochs / global_batch_size, 9)))
    return Batching(steps, global_batch_size, workers, micro_batch_size, share // micro_batch_size)


def plan_training(stage: Training[Any], rows: int, workers: int, micro_batch_size: int | Auto) -> Batching:
    """Plan the batches of a stage without `auto` values. `rows`: examples of an epoch."""
    assert stage.epochs != AUTO, "resolved"
    assert stage.global_batch_size != AUTO, "resolved"
    micro = None if micro_batch_size == AUTO else micro_batch_size
    sequences = rows * stage.sequences_per_row
    batching = plan_batches(sequences, stage.epochs, stage.global_batch_size, workers, micro)
    return replace(batching, steps=batching.steps * stage.steps_per_batch)


@dataclass(frozen=True)
class SequenceMixture:
    """Sources of sequences, concatenated in a SequenceSet, and the weight of each."""

    sizes: tuple[int, ...]
    """Number of sequences of each source."""
    weights: tuple[float, ...]
    """Sampling weights; they sum to 1."""


def data_order(
    lengths: Sequence[int] | Integers,
    steps: int,
    global_batch_size: int,
    seed: int,
    mixture: SequenceMixture | None = None,
) -> Integers:
    """Return steps x global_batch_size row indices: shuffled epochs, concatenated without partial batches between them.

    With a `mixture`, each source has its own epochs, and its fraction of every part of the order is exact to within
    one sequence. Within a step, rows are sorted by length, descending, so that micro batches need little padding and
    the one that needs most memory comes first.
    """
    needed = steps * global_batch_size
    if mixture is None:
        order = _shuffled_epochs(len(lengths), needed, random.Random(seed))
    else:
        order = _mixture_order(mixture, needed, seed)
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


def _mixture_order(mixture: SequenceMixture, needed: int, seed: int) -> Integers:
    """Merge the sources: the n-th sequence of a source with weight w is placed at time (n + 1/2) / w."""
    times, indices, start = [], [], 0
    for source, (size, weight) in enumerate(zip(mixture.sizes, mixture.weights, strict=True)):
        count = min(needed, math.ceil(needed * weight) + 1) if weight and size else 0
        times.append((np.arange(count) + 0.5) / (weight or 1))
        indices.append(start + _shuffled_epochs(max(1, size), count, random.Random(f"{seed}-{source}")))
        start += size
    by_time = np.argsort(np.concatenate(times), kind="stable")[:needed]
    order: Integers = np.concatenate(indices)[by_time]
    return order


def evaluation_batches(
    lengths: Sequence[int] | Integers, size: int, rank: int, workers: int
) -> list[tuple[list[int], bool]]:
    """Return a worker's batches of row indices, sorted by length, each with a flag whether its results count.

    Every worker gets the same number of batches, because under ZeRO-3 each forward pass gathers weights from all. The
    last ones may be padding batches, whose results do not count.
    """
    indices: list[int] = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    num_real = len(batches)
    batches += [batches[0]] * (-num_real % workers)
    return [(batch, index < num_real) for index, batch in enumerate(batches)][rank::workers]


def at_even_steps(steps: int, times: int) -> list[int]:
    """Return `times` evenly spaced steps in 1..steps (fewer if there are fewer steps); the last one is `steps`."""
    return sorted({math.ceil(steps * (index + 1) / times) for index in range(times)})

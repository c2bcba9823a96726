"""Number of steps, batch sizes and data order.

The rows of a step depend only on the data, the seed and the global batch size. The number of workers and the micro
batch size change only the order of additions, so trainings with different `compute` have the same losses up to
floating-point rounding.
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
    """Number of steps and batch sizes, in sequences (in `dpo` and `reward` pairs)."""

    steps: int
    global_batch_size: int
    """workers x micro_batch_size x gradient_accumulation_steps."""
    workers: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    """Micro batches per step and worker."""


def plan_batches(
    rows: int, epochs: float, global_batch_size: int, workers: int, micro_batch_size: int | None
) -> Batching:
    """Return number of steps and batch sizes of a training with `rows` rows per epoch.

    micro_batch_size: None for the largest divisor of a worker's share up to MAX_AUTO_MICRO_BATCH. Raises RequestError
    if the global batch can't be split into equal shares or equal micro batches.
    """
    if global_batch_size % workers:
        raise RequestError(
            f"global_batch_size {global_batch_size} can't be split over {workers} workers",
            remedy=f"use a multiple of {workers}, or fewer workers",
        )
    worker_batch_size = global_batch_size // workers
    if micro_batch_size is None:
        micro_batch_size = max(
            size for size in range(1, min(worker_batch_size, MAX_AUTO_MICRO_BATCH) + 1) if worker_batch_size % size == 0
        )
    if worker_batch_size % micro_batch_size:
        raise RequestError(
            f"micro_batch_size {micro_batch_size} does not divide a worker's share of {worker_batch_size} sequences "
            "per step",
            cause=f"global_batch_size {global_batch_size} over {workers} workers",
            remedy="use a divisor of the share, or micro_batch_size: auto",
        )
    steps = max(1, math.ceil(round(rows * epochs / global_batch_size, 9)))
    return Batching(steps, global_batch_size, workers, micro_batch_size, worker_batch_size // micro_batch_size)


def plan_training(stage: Training[Any], rows: int, workers: int, micro_batch_size: int | Auto) -> Batching:
    """Return number of steps and batch sizes of a stage whose `auto` values are resolved. `rows`: examples per epoch.
    Raises RequestError as `plan_batches`."""
    assert stage.epochs != AUTO, "resolved"
    assert stage.global_batch_size != AUTO, "resolved"
    fixed_micro_batch_size = None if micro_batch_size == AUTO else micro_batch_size
    sequences = rows * stage.sequences_per_row
    batching = plan_batches(sequences, stage.epochs, stage.global_batch_size, workers, fixed_micro_batch_size)
    return replace(batching, steps=batching.steps * stage.steps_per_batch)


@dataclass(frozen=True)
class SequenceMixture:
    """The sources of a concatenated set of sequences, and the weight of each."""

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
    """Return the row indices of all steps, (steps x global_batch_size,): shuffled epochs, concatenated without partial
    batches between them.

    With a `mixture`, each source has its own epochs, and its fraction of every part of the order is exact to within one
    sequence. Within a step, rows are sorted by length, descending, so that micro batches need little padding and the
    one that needs most memory comes first.
    """
    count = steps * global_batch_size
    if mixture is None:
        order = _shuffled_epochs(len(lengths), count, random.Random(seed))
    else:
        order = _mixture_order(mixture, count, seed)
    order_sb = order.reshape(steps, global_batch_size)
    by_length = np.lexsort((order_sb, -np.asarray(lengths)[order_sb]), axis=1)
    return np.take_along_axis(order_sb, by_length, axis=1).ravel()


def _shuffled_epochs(num_rows: int, count: int, rng: random.Random) -> Integers:
    """Return the first `count` row indices of shuffled epochs over `num_rows` rows."""
    epochs = []
    for _ in range(math.ceil(count / num_rows)):
        epoch = array("q", range(num_rows))
        rng.shuffle(epoch)
        epochs.append(np.frombuffer(epoch, np.int64))
    return np.concatenate([np.zeros(0, np.int64), *epochs])[:count]


def _mixture_order(mixture: SequenceMixture, count: int, seed: int) -> Integers:
    """Interleave the sources: the n-th sequence of a source with weight w gets the sort key (n + 1/2) / w."""
    keys, indices, start = [], [], 0
    for source, (size, weight) in enumerate(zip(mixture.sizes, mixture.weights, strict=True)):
        source_count = min(count, math.ceil(count * weight) + 1) if weight and size else 0
        keys.append((np.arange(source_count) + 0.5) / (weight or 1))
        indices.append(start + _shuffled_epochs(max(1, size), source_count, random.Random(f"{seed}-{source}")))
        start += size
    by_key = np.argsort(np.concatenate(keys), kind="stable")[:count]
    order: Integers = np.concatenate(indices)[by_key]
    return order


def evaluation_batches(
    lengths: Sequence[int] | Integers, batch_size: int, rank: int, workers: int
) -> list[tuple[list[int], bool]]:
    """Return the batches of a worker, each as (row indices, whether it is padding). Rows are sorted by length,
    descending.

    Every worker gets the same number of batches, because under ZeRO-3 each forward pass gathers weights from all
    workers. Padding batches make the number equal; ignore their results.
    """
    indices: list[int] = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    num_batches = len(batches)
    batches += [batches[0]] * (-num_batches % workers)
    return [(batch, index >= num_batches) for index, batch in enumerate(batches)][rank::workers]


def evenly_spaced_steps(steps: int, count: int) -> list[int]:
    """Return `count` evenly spaced steps in 1..steps (fewer if there are fewer steps); the last one is `steps`."""
    return sorted({math.ceil(steps * (index + 1) / count) for index in range(count)})

"""Batches of sequences of similar length, within a budget of tokens including padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens per forward pass, including padding. Few on a CPU, so that activations stay in its caches (2 cores, 1 M
parameters: with 4,096 tokens the time per token is 2/3 of that with 16,384)."""


def token_budget_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield batches of indices into `lengths`, shortest sequences first. A batch has at most `budget` tokens, including
    padding, unless it is a single longer sequence. Sequences of length 0 are skipped."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if lengths[index] == 0:
            continue
        if batch and lengths[index] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

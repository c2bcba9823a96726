"""The state of a worker process between two jobs."""

from __future__ import annotations

from tunery.training.training_stats import peak_memory_bytes
from tunery.workers.process_state import free_memory

SIZE = 200_000_000


def test_peak_memory_of_a_training_does_not_include_those_before_it() -> None:
    free_memory()  # imports torch
    earlier = bytes([1]) * SIZE
    with_earlier = peak_memory_bytes("cpu")
    assert len(earlier) == SIZE
    del earlier
    free_memory()
    assert peak_memory_bytes("cpu") < with_earlier - SIZE // 2

"""The state of a worker process between two jobs."""

from __future__ import annotations

from tunery.training.training_stats import peak_memory_bytes
from tunery.workers.process_state import free_memory

SIZE = 200_000_000


def test_peak_memory_does_not_include_earlier_trainings() -> None:
    free_memory()  # imports torch
    earlier = bytes([1]) * SIZE
    peak_with_earlier = peak_memory_bytes("cpu")
    assert len(earlier) == SIZE
    del earlier
    free_memory()
    assert peak_memory_bytes("cpu") < peak_with_earlier - SIZE // 2

"""Rows whose likelihood is mixed into PPO's loss, against forgetting (PPO-ptx, Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, eq. 2)."""

from __future__ import annotations

import random
from typing import Any

from tunery.errors import StageError
from tunery.models.encode import Encoding
from tunery.spec import Ppo
from tunery.training.job import Job
from tunery.training.sequences import ROW_ENCODINGS, SequenceSet, open_rows


class MixedRows:
    """The sequences of `ptx.data`, in an order of their own, round and round."""

    def __init__(self, sequences: SequenceSet, seed: int) -> None:
        self._sequences, self._order = sequences, list(range(len(sequences)))
        random.Random(seed).shuffle(self._order)

    def __call__(self, start: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
        """`count` sequences from place `start` on: what comes before the tokens that count, and these."""
        prompts, responses = [], []
        for place in range(start, start + count):
            index = self._order[place % len(self._order)]
            ids, (begin, end) = self._sequences.ids(index), self._sequences.spans(index)[-1]
            begin = max(begin, 1)  # the first token of a sequence is never predicted
            prompts.append(ids[:begin])
            responses.append(ids[begin:end])
        return prompts, responses


def mixed_rows(job: Job, tokenizer: Any) -> MixedRows | None:
    """None without `ptx`. Raises StageError when no row has a token to learn."""
    assert isinstance(job.spec, Ppo)
    if job.spec.ptx is None:
        return None
    encoding = Encoding(job.spec.max_length, "last_turn")
    sequences = open_rows(job, job.ptx_rows, tokenizer, encoding, ROW_ENCODINGS["sft"])
    if not len(sequences):
        raise StageError(
            job.stage,
            f"none of the rows of `{job.spec.ptx.data}` has a token to learn",
            cause="every response is empty, or cut off because the prompt alone fills max_length",
            remedy="give other rows in `ptx.data`",
        )
    return MixedRows(sequences, job.seed)

"""PPO-ptx: a language-modelling loss on `ptx.data` is added to the loss of PPO, against forgetting (Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, eq. 2)."""

from __future__ import annotations

import random
from typing import Any

from tunery.errors import StageError
from tunery.models.encode import Encoding
from tunery.models.row_encodings import CONVERSATIONS
from tunery.spec import Ppo
from tunery.training.job import Job
from tunery.training.sequences import SequenceSet, open_rows


class PtxData:
    """The sequences of `ptx.data`, shuffled once and repeated indefinitely."""

    def __init__(self, sequences: SequenceSet, seed: int) -> None:
        self._sequences, self._order = sequences, list(range(len(sequences)))
        random.Random(seed).shuffle(self._order)

    def __call__(self, start: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return prompts and responses of `count` sequences from position `start` on: the tokens before the loss
        tokens, and the loss tokens."""
        prompts, responses = [], []
        for position in range(start, start + count):
            index = self._order[position % len(self._order)]
            ids, (begin, end) = self._sequences.ids(index), self._sequences.spans(index)[-1]
            begin = max(begin, 1)  # the first token of a sequence is never predicted
            prompts.append(ids[:begin])
            responses.append(ids[begin:end])
        return prompts, responses


def load_ptx_data(job: Job, tokenizer: Any) -> PtxData | None:
    """Return the sequences of `ptx.data`, or None without `ptx`. Raises StageError if no row has a loss token. Call on
    all ranks."""
    assert isinstance(job.spec, Ppo)
    if job.spec.ptx is None:
        return None
    encoding = Encoding(job.spec.max_length, "last_turn")
    sequences = open_rows(job, job.ptx_data, tokenizer, encoding, CONVERSATIONS)
    if not len(sequences):
        raise StageError(
            job.stage,
            f"none of the rows of `{job.spec.ptx.data}` has a token to train on",
            cause="every response is empty, or is truncated because the prompt alone fills max_length",
            remedy="use other rows in `ptx.data`",
        )
    return PtxData(sequences, job.seed)

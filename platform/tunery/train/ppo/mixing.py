"""Rows whose likelihood is mixed into PPO's loss, against forgetting (PPO-ptx, Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, eq. 2)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tunery.errors import StageError
from tunery.models.encode import Encoded, encode
from tunery.spec import Ppo
from tunery.store.rows import CONTENT
from tunery.train.job import Job, rows_of


def mixed_rows(job: Job, tokenizer: Any) -> Sequence[Encoded]:
    """All of `ptx.data` that has a token to learn, in an order of its own. Raises StageError when none has."""
    assert isinstance(job.spec, Ppo)
    if job.spec.ptx is None:
        return []
    encoded = encode(list(rows_of(job.ptx_rows, CONTENT)), tokenizer, job.spec.max_length, "last_turn")
    items = [item for item in encoded if item.num_loss_tokens]
    if not items:
        raise StageError(
            job.stage,
            f"none of the rows of `{job.spec.ptx.data}` has a token to learn",
            cause="every answer is empty, or cut off because the question alone fills max_length",
            remedy="give other rows in `ptx.data`",
        )
    random.Random(job.seed).shuffle(items)
    return items


def mixed_in(items: Sequence[Encoded], start: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """`count` rows from place `start` on, round and round: what comes before the tokens that count, and these."""
    chosen = [items[place % len(items)] for place in range(start, start + count)]
    # The first token of a sequence is never predicted.
    spans = [(max(item.response[0], 1), item.response[1]) for item in chosen]
    return (
        [item.ids[:start] for item, (start, _) in zip(chosen, spans, strict=True)],
        [item.ids[start:end] for item, (start, end) in zip(chosen, spans, strict=True)],
    )

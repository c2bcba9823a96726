"""Instruction-following difficulty: how little the prompt helps to predict the response
(https://arxiv.org/abs/2308.12032).

IFD(Q, A) = ppl(A | Q) / ppl(A). The paper's code uses a ratio of mean losses in some places; this is the ratio of
perplexities of its equation, over the same response tokens. The unconditional perplexity is that of the response after
the generation prompt of the chat template.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tunery.models.nll import NllSpan
from tunery.scoring.scorers.interfaces import Columns
from tunery.spec import Ifd


class IfdScorer:
    spans: tuple[NllSpan, ...] = ("response", "unconditional")

    def __init__(self, spec: Ifd) -> None:
        """The spec has only the model, which the actor loads."""

    def __call__(self, sums: Mapping[NllSpan, Sequence[tuple[float, int]]]) -> Columns:
        """Return "score" above 0; NaN for plain texts, which have no prompt, and for rows without response tokens."""
        return {"score": [ifd(*pair) for pair in zip(sums["response"], sums["unconditional"], strict=True)]}


def ifd(conditional: tuple[float, int], unconditional: tuple[float, int]) -> float:
    """Return exp(mean loss given the prompt - mean loss without it); each argument is (sum in nats, tokens)."""
    if not conditional[1] or not unconditional[1]:
        return math.nan
    difference = conditional[0] / conditional[1] - unconditional[0] / unconditional[1]
    return math.exp(max(-700.0, min(700.0, difference)))

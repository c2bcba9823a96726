"""Instruction-following difficulty: how little the question helps to say the answer (https://arxiv.org/abs/2308.12032).

IFD(Q, A) = ppl(A | Q) / ppl(A). The paper's code takes a ratio of mean losses in places; this is the ratio of
perplexities of its equation, on the same answer tokens in both: alone, they follow the template's opening of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tunery.models.nll import SpanNll
from tunery.scoring.scorers.registry import Columns
from tunery.spec import Ifd


class IfdScorer:
    views: tuple[SpanNll, ...] = ("answer", "alone")

    def __init__(self, spec: Ifd) -> None:
        """The model is all that there is to set, and that is loaded by whoever makes the forward passes."""

    def __call__(self, sums: Mapping[SpanNll, Sequence[tuple[float, int]]]) -> Columns:
        """score: above 0; NaN for texts, which have no question, and where no token counts."""
        return {"score": [ifd(*pair) for pair in zip(sums["answer"], sums["alone"], strict=True)]}


def ifd(given: tuple[float, int], alone: tuple[float, int]) -> float:
    """exp(mean loss given the question - mean loss alone), each (nats summed, tokens)."""
    if not given[1] or not alone[1]:
        return math.nan
    return math.exp(max(-700.0, min(700.0, given[0] / given[1] - alone[0] / alone[1])))

"""Perplexity: exp of the mean -log p over a row's tokens (https://arxiv.org/abs/2309.04564)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tunery.models.nll import SpanNll
from tunery.scoring.scorers.registry import Columns
from tunery.spec import Perplexity


class PerplexityScorer:
    def __init__(self, spec: Perplexity) -> None:
        self._view: SpanNll = spec.of
        self.views = (self._view,)

    def __call__(self, sums: Mapping[SpanNll, Sequence[tuple[float, int]]]) -> Columns:
        """score: in [1, exp(700)], NaN where no token counts; nll: nats, summed; tokens."""
        pairs = sums[self._view]
        return {
            "score": [perplexity(nll, tokens) for nll, tokens in pairs],
            "nll": [nll for nll, _ in pairs],
            "tokens": [tokens for _, tokens in pairs],
        }


def perplexity(nll: float, tokens: int) -> float:
    """Past exp(709) a double is infinite; such a row is as bad as can be told."""
    return math.exp(min(nll / tokens, 700.0)) if tokens else math.nan

"""Perplexity: exp of the mean -log p over the tokens of a row (https://arxiv.org/abs/2309.04564)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tunery.models.nll import NllSpan
from tunery.scoring.scorers.interfaces import Columns
from tunery.spec import Perplexity


class PerplexityScorer:
    def __init__(self, spec: Perplexity) -> None:
        self._span: NllSpan = spec.of
        self.spans = (self._span,)

    def __call__(self, sums: Mapping[NllSpan, Sequence[tuple[float, int]]]) -> Columns:
        """Return "score" in [1, exp(700)] (NaN for a row without tokens), "nll" (sum in nats) and "tokens"."""
        pairs = sums[self._span]
        return {
            "score": [perplexity(nll, tokens) for nll, tokens in pairs],
            "nll": [nll for nll, _ in pairs],
            "tokens": [tokens for _, tokens in pairs],
        }


def perplexity(nll: float, tokens: int) -> float:
    """Return exp(nll / tokens), with the exponent capped at 700 because exp(709) overflows a double."""
    return math.exp(min(nll / tokens, 700.0)) if tokens else math.nan

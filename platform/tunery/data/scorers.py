"""The scorers: a table from a score's name to what makes it and which end of it is good."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelScorer:
    """Scores rows by one forward pass of a causal language model."""

    score: Callable[[Sequence[Row], PreTrainedModel, PreTrainedTokenizerBase, int], list[dict[str, Any]]]
    """(rows, model, tokenizer, max_length) -> per row the score under its name, and tokens, truncated."""
    good: Literal["low", "high"]


def perplexity(
    rows: Sequence[Row], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """exp of the mean -log p over the answer's tokens (the whole text's); NaN where no token counts."""
    from tunery.models.encode import encode
    from tunery.models.likelihood import answer_nll

    encoded = encode(rows, tokenizer, max_length)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int), "load_tokenizer saw to it"
    scores = []
    for item, (nll, tokens) in zip(encoded, answer_nll(model, encoded, pad), strict=True):
        # Past exp(709) a double is infinite; such a row is as bad as can be told.
        value = math.exp(min(nll / tokens, 700.0)) if tokens else math.nan
        scores.append({"perplexity": value, "nll": nll, "tokens": tokens, "truncated": item.truncated})
    return scores


SCORERS: dict[str, ModelScorer] = {
    "perplexity": ModelScorer(perplexity, good="low"),
}

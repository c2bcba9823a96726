"""Negative log-likelihood of the tokens of many sequences, and of the parts of rows that scorers use.

Sequences of similar length share a forward pass, up to a token budget. They are padded on the right without an
attention mask, which causal attention does not need and which would disable its fast path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunery.models.batching import BATCH_TOKENS, token_budget_batches
from tunery.models.encode import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SpanNll = Literal["response", "all", "alone"]
"""Scored tokens and their context.
response: tokens of the last response, given all that precedes it (of a text: all tokens);
all: all tokens but the first;
alone: tokens of the last response, given only the template's generation prompt."""


@dataclass(frozen=True)
class Tokens:
    """A sequence and the ascending indices of its scored tokens, from 1 (the first token has no prediction)."""

    ids: Sequence[int]
    scored: Sequence[int]


class Likelihood:
    """Computes negative log-likelihoods under one model."""

    def __init__(self, model: PreTrainedModel, pad: int, batch_tokens: int | None = None) -> None:
        from tunery.models.token_log_probs import LOGIT_BYTES, TokenLogProbs

        self._device, self._pad = model.device, pad
        self._budget = batch_tokens or BATCH_TOKENS[model.device.type]
        self._log_probs = TokenLogProbs(model.requires_grad_(False))
        if not self._log_probs.has_plain_head:
            # The logits of all tokens are computed at once.
            self._budget = max(1, min(self._budget, LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size)))

    def nll(self, sequences: Sequence[Tokens]) -> list[np.ndarray]:
        """Return -log p of the scored tokens of each sequence in nats, float32, in the order of `sequences`."""
        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(sequences)
        for batch in token_budget_batches([row.scored[-1] + 1 if row.scored else 0 for row in sequences], self._budget):
            rows = [sequences[index] for index in batch]
            values = self._forward(rows)
            ends = np.cumsum([len(row.scored) for row in rows])[:-1]
            for index, row in zip(batch, np.split(values, ends), strict=True):
                results[index] = row
        return results

    def _forward(self, rows: Sequence[Tokens]) -> np.ndarray:
        """Return -log p of all scored tokens, row after row."""
        import torch

        # Tokens after the last scored one are not needed.
        needed = [row.ids[: row.scored[-1] + 1] for row in rows]
        max_length = max(map(len, needed))
        ids_bt = torch.tensor([[*ids, *[self._pad] * (max_length - len(ids))] for ids in needed], device=self._device)
        # The token at t is predicted from the hidden state at t - 1.
        indices = [b * max_length + t - 1 for b, row in enumerate(rows) for t in row.scored]
        state_indices_n = torch.tensor(indices, device=self._device)
        targets_n = ids_bt.flatten()[state_indices_n + 1]
        with torch.inference_mode():
            log_probs_n, _ = self._log_probs({"input_ids": ids_bt}, state_indices_n, targets_n)
        nll: np.ndarray = (-log_probs_n).cpu().numpy()
        return nll


def response_nll(likelihood: Likelihood, encoded: Sequence[Encoded]) -> list[tuple[float, int]]:
    """Return (sum of -log p in nats, number of tokens) over the loss tokens of each sequence; (0.0, 0) without any."""
    return nll_by_span(likelihood, encoded, ["response"])["response"]


def nll_by_span(
    likelihood: Likelihood, encoded: Sequence[Encoded], views: Sequence[SpanNll]
) -> dict[SpanNll, list[tuple[float, int]]]:
    """Return (sum of -log p in nats, number of tokens) of each of `encoded` for each view. `response` and `all` share a
    forward pass. For a text, `alone` is (0.0, 0).
    """
    sequences: list[Tokens] = []
    in_context = [view for view in views if view != "alone"]
    if in_context:
        # `all` includes the tokens of the response.
        sequences += [
            Tokens(item.ids, range(1, len(item.ids)) if "all" in in_context else item.loss_indices) for item in encoded
        ]
    if "alone" in views:
        sequences += [_response_alone(item) for item in encoded]
    nll = likelihood.nll(sequences)
    sums: dict[SpanNll, list[tuple[float, int]]] = {}
    for view in in_context:
        sums[view] = [
            _sum(
                values[np.array(item.loss_indices, np.int64) - 1]
                if view == "response" and "all" in in_context
                else values
            )
            for values, item in zip(nll, encoded, strict=False)
        ]
    if "alone" in views:
        sums["alone"] = [_sum(values) for values in nll[-len(encoded) :]]
    return sums


def _response_alone(item: Encoded) -> Tokens:
    """The response, preceded only by the chat template's generation prompt."""
    start, end = item.response
    if not item.generation_prompt_ids or start == end:
        return Tokens((), ())
    ids = [*item.generation_prompt_ids, *item.ids[start:end]]
    return Tokens(ids, range(len(item.generation_prompt_ids), len(ids)))


def _sum(values: np.ndarray) -> tuple[float, int]:
    return float(values.sum(dtype=np.float64)), len(values)

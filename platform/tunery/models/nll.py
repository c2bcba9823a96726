"""Negative log-likelihood of tokens of many sequences, and of the spans of rows that scorers use.

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

NllSpan = Literal["response", "all", "unconditional"]
"""Which tokens of a row are scored, and given which context.

response: tokens of the last response (of a text: all tokens), given all tokens before them
all: all tokens but the first, given all tokens before them
unconditional: tokens of the last response, given only the generation prompt of the chat template
"""


@dataclass(frozen=True)
class ScoredSequence:
    """A token sequence, and which of its tokens are scored."""

    ids: Sequence[int]
    scored: Sequence[int]
    """Ascending indices of the scored tokens, from 1, since no hidden state predicts the first token."""


class Likelihood:
    """Computes negative log-likelihoods under one model."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int, batch_tokens: int | None = None) -> None:
        """batch_tokens: maximum number of tokens in a forward pass, including padding."""
        from tunery.models.token_log_probs import LOGIT_BYTES, TokenLogProbs

        self._device, self._pad_token_id = model.device, pad_token_id
        self._budget = batch_tokens or BATCH_TOKENS[model.device.type]
        self._log_probs = TokenLogProbs(model.requires_grad_(False))
        if not self._log_probs.has_plain_head:
            # The logits of all tokens are computed at once.
            self._budget = max(1, min(self._budget, LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size)))

    def nll(self, sequences: Sequence[ScoredSequence]) -> list[np.ndarray]:
        """Return -log p of the scored tokens of each sequence in nats, (scored tokens,) float32 each."""
        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(sequences)
        lengths = [sequence.scored[-1] + 1 if sequence.scored else 0 for sequence in sequences]
        for batch in token_budget_batches(lengths, self._budget):
            batch_sequences = [sequences[index] for index in batch]
            nll_n = self._forward(batch_sequences)
            ends = np.cumsum([len(sequence.scored) for sequence in batch_sequences])[:-1]
            for index, sequence_nll in zip(batch, np.split(nll_n, ends), strict=True):
                results[index] = sequence_nll
        return results

    def _forward(self, sequences: Sequence[ScoredSequence]) -> np.ndarray:
        """Return -log p of all scored tokens of a batch, (n,), one sequence after another."""
        import torch

        # Tokens after the last scored one are not needed.
        inputs = [sequence.ids[: sequence.scored[-1] + 1] for sequence in sequences]
        max_length = max(map(len, inputs))
        padded = [[*ids, *[self._pad_token_id] * (max_length - len(ids))] for ids in inputs]
        ids_bt = torch.tensor(padded, device=self._device)
        # The token at t is predicted from the hidden state at t - 1.
        indices = [b * max_length + t - 1 for b, sequence in enumerate(sequences) for t in sequence.scored]
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
    likelihood: Likelihood, encoded: Sequence[Encoded], spans: Sequence[NllSpan]
) -> dict[NllSpan, list[tuple[float, int]]]:
    """Return, for each span, (sum of -log p in nats, number of tokens) of each of `encoded`.

    `response` and `all` share a forward pass. For a text, `unconditional` is (0.0, 0).
    """
    sequences: list[ScoredSequence] = []
    in_context = [span for span in spans if span != "unconditional"]
    if in_context:
        # `all` includes the tokens of the response.
        sequences += [
            ScoredSequence(item.ids, range(1, len(item.ids)) if "all" in in_context else item.loss_indices)
            for item in encoded
        ]
    if "unconditional" in spans:
        sequences += [_without_prompt(item) for item in encoded]
    nll = likelihood.nll(sequences)
    sums: dict[NllSpan, list[tuple[float, int]]] = {}
    for span in in_context:
        sums[span] = [
            _sum(
                values[np.array(item.loss_indices, np.int64) - 1]
                if span == "response" and "all" in in_context
                else values
            )
            for values, item in zip(nll, encoded, strict=False)
        ]
    if "unconditional" in spans:
        sums["unconditional"] = [_sum(values) for values in nll[-len(encoded) :]]
    return sums


def _without_prompt(item: Encoded) -> ScoredSequence:
    """Return the response after the generation prompt of the chat template, without the conversation before it."""
    start, end = item.response
    if not item.generation_prompt_ids or start == end:
        return ScoredSequence((), ())
    ids = [*item.generation_prompt_ids, *item.ids[start:end]]
    return ScoredSequence(ids, range(len(item.generation_prompt_ids), len(ids)))


def _sum(values: np.ndarray) -> tuple[float, int]:
    return float(values.sum(dtype=np.float64)), len(values)

"""Negative log-likelihood of tokens under a causal language model, without a batch's logits ever in memory.

Three things make it fast. Sequences of like length share a forward pass, up to a budget of tokens. They are padded on
the right and no attention mask is given: under causal attention a token never sees what comes after it, so padding
changes nothing that counts, and attention keeps its fast path. And the head, the largest matrix of a small model, is
applied to the hidden states of the counted tokens only, a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunery.models.batching import BATCH_TOKENS, token_budget_batches
from tunery.models.encode import Encoded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Logits = Callable[[torch.Tensor], torch.Tensor]

SpanNll = Literal["answer", "whole", "alone"]
"""Which tokens count, and what the model sees before them:
answer: the last answer's tokens after all that comes before it (of a text, all tokens);
whole: all tokens but the first;
alone: the last answer's tokens after nothing but the template's opening of an answer."""
LOGIT_BYTES = 1 << 28
"""At most so much memory for logits, in fp32."""


@dataclass(frozen=True)
class Tokens:
    """A sequence, and the indices of the tokens that count, ascending (from 1: nothing predicts the very first)."""

    ids: Sequence[int]
    counted: Sequence[int]


class Likelihood:
    """A model made ready: `nll` can be asked again and again."""

    def __init__(self, model: PreTrainedModel, pad: int, batch_tokens: int | None = None) -> None:
        self._model, self._pad = model, pad
        self._budget = batch_tokens or BATCH_TOKENS[model.device.type]
        self._vocabulary = model.config.get_text_config().vocab_size
        self._head: Logits | None = model.get_output_embeddings()
        if not head_is_plain(model):
            # Gemma caps its logits, Cohere scales them: such a model makes its own, and fewer tokens share a forward.
            self._head = None
            self._budget = max(1, min(self._budget, LOGIT_BYTES // (4 * self._vocabulary)))

    def nll(self, sequences: Sequence[Tokens]) -> list[np.ndarray]:
        """-log p in nats of the counted tokens of each sequence, float32, in the order of `sequences`."""
        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(sequences)
        for batch in token_budget_batches(
            [row.counted[-1] + 1 if row.counted else 0 for row in sequences], self._budget
        ):
            rows = [sequences[index] for index in batch]
            values = self._forward(rows)
            ends = np.cumsum([len(row.counted) for row in rows])[:-1]
            for index, row in zip(batch, np.split(values, ends), strict=True):
                results[index] = row
        return results

    def _forward(self, rows: Sequence[Tokens]) -> np.ndarray:
        """All counted tokens of `rows`, one row after another."""
        import torch

        # What comes after the last counted token predicts nothing that counts.
        needed = [row.ids[: row.counted[-1] + 1] for row in rows]
        longest = max(map(len, needed))
        device = self._model.device
        ids_bt = torch.tensor([[*ids, *[self._pad] * (longest - len(ids))] for ids in needed], device=device)
        # The token at t is predicted from the hidden state at t - 1.
        places_n = torch.tensor([b * longest + t - 1 for b, row in enumerate(rows) for t in row.counted], device=device)
        targets_n = ids_bt.flatten()[places_n + 1]
        with torch.inference_mode():
            if self._head is None:
                logits_bv = self._model(input_ids=ids_bt, use_cache=False).logits.flatten(0, 1)
                return _nll(logits_bv[places_n], targets_n).cpu().numpy()
            hidden_bth = self._model.base_model(input_ids=ids_bt, use_cache=False).last_hidden_state
            hidden_nh = hidden_bth.flatten(0, 1)[places_n]
            piece = max(1, LOGIT_BYTES // (4 * self._vocabulary))
            nll_n = torch.cat(
                [
                    _nll(self._head(hidden_nh[start : start + piece]), targets_n[start : start + piece])
                    for start in range(0, len(places_n), piece)
                ]
            )
        return nll_n.cpu().numpy()


def response_nll(likelihood: Likelihood, encoded: Sequence[Encoded]) -> list[tuple[float, int]]:
    """(sum of -log p over the tokens with a loss in nats, their number) for each of `encoded`, in its order.

    One without such tokens has (0.0, 0).
    """
    return nll_by_span(likelihood, encoded, ["answer"])["answer"]


def nll_by_span(
    likelihood: Likelihood, encoded: Sequence[Encoded], views: Sequence[SpanNll]
) -> dict[SpanNll, list[tuple[float, int]]]:
    """(sum of -log p in nats, tokens) of each of `encoded` in each view; one forward serves `answer` and `whole`.

    A text has nothing to compare: (0.0, 0) alone.
    """
    wanted: list[Tokens] = []
    along = [view for view in views if view != "alone"]
    if along:
        # All tokens hold the answer's, too.
        wanted += [
            Tokens(item.ids, range(1, len(item.ids)) if "whole" in along else item.loss_indices) for item in encoded
        ]
    if "alone" in views:
        wanted += [_response_alone(item) for item in encoded]
    found = likelihood.nll(wanted)
    sums: dict[SpanNll, list[tuple[float, int]]] = {}
    for view in along:
        sums[view] = [
            _sum(values[np.array(item.loss_indices, np.int64) - 1] if view == "answer" and "whole" in along else values)
            for values, item in zip(found, encoded, strict=False)
        ]
    if "alone" in views:
        sums["alone"] = [_sum(values) for values in found[-len(encoded) :]]
    return sums


def _response_alone(item: Encoded) -> Tokens:
    """The response after nothing but what the chat template puts before one."""
    start, end = item.response
    if not item.generation_prompt_ids or start == end:
        return Tokens((), ())
    ids = [*item.generation_prompt_ids, *item.ids[start:end]]
    return Tokens(ids, range(len(item.generation_prompt_ids), len(ids)))


def _sum(values: np.ndarray) -> tuple[float, int]:
    return float(values.sum(dtype=np.float64)), len(values)


def _nll(logits_nv: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits_nv.float(), targets_n, reduction="none")


def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether the head alone, laid on the base model's hidden states, gives the model's logits."""
    import torch

    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
        ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    return ours.shape == whole.shape and torch.allclose(ours.float(), whole.float(), rtol=1e-3, atol=1e-4)

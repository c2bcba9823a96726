"""Negative log-likelihood of answers under a causal language model, without a batch's logits ever in memory at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tunery.models.encode import Encoded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOGIT_BYTES = 1 << 29
"""At most so much memory for the logits of one forward, in fp32."""
MOST_TOKENS = 8192


def token_budget(vocabulary: int) -> int:
    """Padded tokens in one forward pass."""
    return max(1, min(MOST_TOKENS, LOGIT_BYTES // (4 * vocabulary)))


def answer_nll(model: PreTrainedModel, encoded: Sequence[Encoded], pad: int) -> list[tuple[float, int]]:
    """(sum of -log p over the counted tokens in nats, their number) for each of `encoded`, in its order.

    Rows of like length share a forward pass, so that little is padded. An empty answer has (0.0, 0).
    """
    import torch

    results: list[tuple[float, int]] = [(0.0, 0)] * len(encoded)
    for batch in _batches(encoded, token_budget(model.config.get_text_config().vocab_size)):
        sums = _forward(model, [encoded[index] for index in batch], pad)
        for index, value in zip(batch, sums.tolist(), strict=True):
            results[index] = (value, encoded[index].counted)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return results


def _batches(encoded: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Indices in batches of like length whose padded size stays within `budget` tokens; at least one row each."""
    batch: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda index: (len(encoded[index].ids), index)):
        if encoded[index].counted == 0:
            continue
        if batch and len(encoded[index].ids) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _forward(model: PreTrainedModel, rows: Sequence[Encoded], pad: int) -> torch.Tensor:
    import torch

    longest = max(len(row.ids) for row in rows)
    ids_bt = torch.tensor([row.ids + [pad] * (longest - len(row.ids)) for row in rows], device=model.device)
    mask_bt = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows], device=model.device)
    labels_bt = torch.tensor([row.labels + [-100] * (longest - len(row.ids)) for row in rows], device=model.device)
    with torch.inference_mode():
        logits_btv = model(input_ids=ids_bt, attention_mask=mask_bt, use_cache=False).logits
        nll_bt = torch.nn.functional.cross_entropy(
            logits_btv[:, :-1].float().transpose(1, 2), labels_bt[:, 1:], ignore_index=-100, reduction="none"
        )
    return nll_bt.double().sum(dim=1)

"""Logits of a sequence-classification model: reward models and text classifiers alike.

Inputs are encoded by models/classifier_inputs.py. Rows of similar length share a forward pass, up to a
token budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunery.models.batching import BATCH_TOKENS, token_budget_batches
from tunery.models.classifier_inputs import ClassifierEncoder
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classified:
    """Outputs of a SequenceClassifier."""

    logits: np.ndarray
    """(rows, labels), float32; NaN for a row without tokens."""
    tokens: list[int]
    """Number of tokens of each row, after truncation."""
    truncated: list[bool]


class SequenceClassifier:
    """Computes the logits of a sequence-classification model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_tokens: int | None = None,
    ) -> None:
        """Rows are truncated to `max_length` tokens, or to the model's maximum position if that is less."""
        self._model, self._encoder = model, ClassifierEncoder(model, tokenizer, max_length)
        self._budget = batch_tokens or BATCH_TOKENS[model.device.type]

    def __call__(self, rows: Sequence[Row]) -> Classified:
        import torch

        encoded = self._encoder(rows)
        lengths = [len(item.ids) for item in encoded]
        logits_nl = np.full((len(rows), self._model.config.num_labels), np.nan, np.float32)
        for batch in token_budget_batches(lengths, self._budget):
            with torch.inference_mode():
                logits_bl = self._model(**self._encoder.tensors([encoded[index] for index in batch])).logits
            assert logits_bl.shape == (len(batch), logits_nl.shape[1])
            logits_nl[batch] = logits_bl.float().cpu().numpy()
        return Classified(logits_nl, lengths, [item.truncated for item in encoded])

"""Logits of sequence-classification models: reward models and text classifiers.

models/classifier_inputs.py encodes the inputs. Rows of similar length share a forward pass, within a token budget.
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
        """max_length: rows are truncated to so many tokens, or to the model's maximum position if that is less;
        batch_tokens: maximum number of tokens in a forward pass, including padding."""
        self._model, self._encoder = model, ClassifierEncoder(model, tokenizer, max_length)
        self._budget = batch_tokens or BATCH_TOKENS[model.device.type]

    def __call__(self, rows: Sequence[Row]) -> Classified:
        """Return the logits of all rows."""
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

"""Logits of a sequence-classification model: reward models and text classifiers alike.

What the model sees of a row stands in models/classifier_inputs.py. Rows of like length share a forward pass, up to a
budget of tokens.
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
    logits: np.ndarray
    """(rows, labels), float32; NaN for a row without a token."""
    tokens: list[int]
    """That the model saw of each row."""
    truncated: list[bool]


class SequenceClassifier:
    """A model made ready: it can be asked again and again."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_tokens: int | None = None,
    ) -> None:
        """Rows are cut to `max_length` tokens, or to what the model has positions for, whichever is less."""
        self._model, self._read = model, ClassifierEncoder(model, tokenizer, max_length)
        self._budget = batch_tokens or BATCH_TOKENS[model.device.type]

    def __call__(self, rows: Sequence[Row]) -> Classified:
        import torch

        seen = self._read(rows)
        lengths = [len(item.ids) for item in seen]
        logits_nl = np.full((len(rows), self._model.config.num_labels), np.nan, np.float32)
        for batch in token_budget_batches(lengths, self._budget):
            with torch.inference_mode():
                logits_bl = self._model(**self._read.tensors([seen[index] for index in batch])).logits
            assert logits_bl.shape == (len(batch), logits_nl.shape[1])
            logits_nl[batch] = logits_bl.float().cpu().numpy()
        return Classified(logits_nl, lengths, [item.truncated for item in seen])

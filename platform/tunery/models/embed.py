"""Embeddings of rows: the mean of a model's last hidden states over a row's tokens, normalized to length 1.

Reimers & Gurevych 2019, "Sentence-BERT" (https://arxiv.org/abs/1908.10084), section 3: mean pooling is the best of the
pooling strategies there. models/classifier_inputs.py encodes the inputs.
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
class Embedded:
    """Outputs of an Embedder."""

    vectors: np.ndarray
    """(rows, hidden size), float32, each of length 1; NaN for a row without tokens."""
    tokens: list[int]
    """Number of tokens of each row, after truncation."""
    truncated: list[bool]


class Embedder:
    """Computes embeddings with a model without head."""

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

    def __call__(self, rows: Sequence[Row]) -> Embedded:
        """Return the embeddings of all rows."""
        import torch

        encoded = self._encoder(rows)
        lengths = [len(item.ids) for item in encoded]
        vectors_nh = np.full((len(rows), self._model.config.get_text_config().hidden_size), np.nan, np.float32)
        for batch in token_budget_batches(lengths, self._budget):
            inputs = self._encoder.tensors([encoded[index] for index in batch])
            with torch.inference_mode():
                hidden_bth = self._model(**inputs).last_hidden_state.float()
                counts_bt1 = inputs["attention_mask"][:, :, None]
                mean_bh = (hidden_bth * counts_bt1).sum(1) / counts_bt1.sum(1)
                vectors_nh[batch] = torch.nn.functional.normalize(mean_bh, dim=1).cpu().numpy()
        return Embedded(vectors_nh, lengths, [item.truncated for item in encoded])

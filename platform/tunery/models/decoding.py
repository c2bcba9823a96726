"""A decoding batch: its tokens and KV cache, eviction of finished rows, and merging with another batch.

Rows are padded on the left, so that the last column has the newest token of every row, whenever the row was started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass
class DecodingBatch:
    """Rows (a prompt with its response so far) that are decoded together."""

    rows_b: torch.Tensor
    """(rows,), int64: index of each row's prompt."""
    num_tokens_b: torch.Tensor
    """(rows,), int64: number of sampled tokens. It also increases after a row has finished, until it is evicted."""
    active_b: torch.Tensor
    """(rows,), bool: False for finished rows."""
    ids_bt: torch.Tensor
    """(rows, new), int64: input of the next forward pass: first the full prompt, then the last sampled token."""
    positions_bt: torch.Tensor
    """(rows, new), int64: position ids of `ids_bt`, without padding."""
    mask_bw: torch.Tensor
    """(rows, cached and new tokens), int64: attention mask, 0 on padding."""
    cache: DynamicCache

    @classmethod
    def from_prompts(
        cls, rows: list[int], prompts: list[list[int]], config: Any, device: torch.device
    ) -> DecodingBatch:
        """Create a batch with an empty cache. rows: indices into `prompts`; config: of the model."""
        from transformers import DynamicCache

        max_length = max(len(prompts[row]) for row in rows)
        padding = [max_length - len(prompts[row]) for row in rows]
        ids = [[0] * count + prompts[row] for count, row in zip(padding, rows, strict=True)]
        mask_bw = torch.tensor([[0] * count + [1] * (max_length - count) for count in padding], device=device)
        rows_b = torch.tensor(rows, device=device)
        return cls(
            rows_b,
            torch.zeros_like(rows_b),
            torch.ones_like(rows_b, dtype=torch.bool),
            torch.tensor(ids, device=device),
            (mask_bw.cumsum(1) - 1).clamp(min=0),
            mask_bw,
            DynamicCache(config=config),
        )

    def forward(self, model: Any) -> torch.Tensor:
        """Return the logits of each row's next token, (rows, vocabulary)."""
        logits_b1v: torch.Tensor = model(
            input_ids=self.ids_bt,
            attention_mask=self.mask_bw,
            position_ids=self.positions_bt,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits_b1v[:, -1]

    def append(self, tokens_b: torch.Tensor, finished_b: torch.Tensor) -> None:
        """Append the sampled tokens, (rows,) int64. finished_b: (rows,) bool, whether the token ends its row."""
        # Position ids of finished rows do not increase, since they might exceed the model's maximum before eviction.
        self.ids_bt, self.positions_bt = tokens_b[:, None], self.positions_bt[:, -1:] + self.active_b[:, None]
        self.mask_bw = pad(self.mask_bw, (0, 1), value=1)
        self.active_b &= ~finished_b
        self.num_tokens_b += 1

    def evict_finished(self) -> None:
        """Remove finished rows, and columns that are padding in all remaining rows."""
        remaining = self.active_b.nonzero()[:, 0]
        for name in ("rows_b", "num_tokens_b", "active_b", "ids_bt", "positions_bt", "mask_bw"):
            setattr(self, name, getattr(self, name)[remaining])
        self.cache.batch_select_indices(remaining)
        if len(remaining) and self.can_merge:
            num_padding = int(self.mask_bw.argmax(1).min())
            self.mask_bw = self.mask_bw[:, num_padding:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, num_padding:], layer.values[:, :, num_padding:]

    @property
    def can_merge(self) -> bool:
        """Whether all cache layers contain the keys and values of all tokens, so that columns can be added or removed.
        The other cache layers of transformers (5.23), sliding windows and recurrent states, do not allow that."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def merge(self, other: DecodingBatch) -> None:
        """Add the rows of `other`, whose cache contains their prompts already."""
        for name in ("rows_b", "num_tokens_b", "active_b", "ids_bt", "positions_bt"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        cached, other_cached = self.mask_bw.shape[1] - 1, other.mask_bw.shape[1] - 1
        padding, other_padding = max(0, other_cached - cached), max(0, cached - other_cached)
        self.mask_bw = torch.cat([pad(self.mask_bw, (padding, 0)), pad(other.mask_bw, (other_padding, 0))])
        for layer, other_layer in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                states, other_states = getattr(layer, name), getattr(other_layer, name)
                padded = [pad(states, (0, 0, padding, 0)), pad(other_states, (0, 0, other_padding, 0))]
                setattr(layer, name, torch.cat(padded))

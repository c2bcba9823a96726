"""Rows that are answered together: what they have said, their key-value cache, and how rows leave and join it.

Rows are padded on the left, so that the last column is the newest token of every row, however long ago each began.
Widths: a batch is as wide as the longest prompt and answer in it.
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
    rows_b: torch.Tensor
    """(rows,), int64: which prompt each answers."""
    times_b: torch.Tensor
    """(rows,), int64: how many tokens have been drawn for it; goes on when it has ended, until it leaves."""
    alive_b: torch.Tensor
    """(rows,), bool: not ended yet."""
    ids_bt: torch.Tensor
    """(rows, new), int64: what the model has not read yet. The whole prompt at first, then the last token drawn."""
    positions_bt: torch.Tensor
    """(rows, new), int64: of these in their own row."""
    mask_bw: torch.Tensor
    """(rows, width), int64: 0 on the padding; over what is in the cache and what is not read yet."""
    cache: DynamicCache

    @classmethod
    def of(cls, rows: list[int], prompts: list[list[int]], config: Any, device: torch.device) -> DecodingBatch:
        """That has read nothing yet. rows: which of `prompts`."""
        from transformers import DynamicCache

        longest = max(len(prompts[row]) for row in rows)
        gaps = [longest - len(prompts[row]) for row in rows]
        ids = [[0] * gap + prompts[row] for gap, row in zip(gaps, rows, strict=True)]
        mask_bw = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps], device=device)
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
        """(rows, vocabulary): logits of each row's next token."""
        logits_b1v: torch.Tensor = model(
            input_ids=self.ids_bt,
            attention_mask=self.mask_bw,
            position_ids=self.positions_bt,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits_b1v[:, -1]

    def append(self, tokens_b: torch.Tensor, ends_b: torch.Tensor) -> None:
        """What was drawn, and whether that ends the row."""
        # A row that has ended stays where it is: else it would walk out of the model's window until it leaves.
        self.ids_bt, self.positions_bt = tokens_b[:, None], self.positions_bt[:, -1:] + self.alive_b[:, None]
        self.mask_bw = pad(self.mask_bw, (0, 1), value=1)
        self.alive_b &= ~ends_b
        self.times_b += 1

    def leave(self) -> None:
        """Rows that have ended, and columns that were padding in all rows that stay."""
        kept = self.alive_b.nonzero()[:, 0]
        for name in ("rows_b", "times_b", "alive_b", "ids_bt", "positions_bt", "mask_bw"):
            setattr(self, name, getattr(self, name)[kept])
        self.cache.batch_select_indices(kept)
        if len(kept) and self.joinable:
            first = int(self.mask_bw.argmax(1).min())
            self.mask_bw = self.mask_bw[:, first:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]

    @property
    def joinable(self) -> bool:
        """Whether the cache is nothing but keys and values of all tokens: sliding windows and recurrent states
        (transformers 5.23's other layers) keep places or sums that don't move with the columns."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def join(self, other: DecodingBatch) -> None:
        """Rows that have been begun as this one's have."""
        for name in ("rows_b", "times_b", "alive_b", "ids_bt", "positions_bt"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        read, others = self.mask_bw.shape[1] - 1, other.mask_bw.shape[1] - 1
        left, others_left = max(0, others - read), max(0, read - others)
        self.mask_bw = torch.cat([pad(self.mask_bw, (left, 0)), pad(other.mask_bw, (others_left, 0))])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                old, new = getattr(mine, name), getattr(theirs, name)
                setattr(mine, name, torch.cat([pad(old, (0, 0, left, 0)), pad(new, (0, 0, others_left, 0))]))

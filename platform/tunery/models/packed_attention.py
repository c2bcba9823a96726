"""Attention over rows that are concatenated to one sequence, instead of padded to equal length.

A padded batch is often one third padding or more. All operations but attention work on single tokens and need no
padding, if position ids restart with each row. Attention gets the row boundaries, by transformers' interface for
attention functions (https://huggingface.co/docs/transformers/attention_interface). A small probe batch tests whether a
model uses that interface and keeps rows independent.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

MIN_LENGTH_RATIO = 0.75
"""Minimum length of a row in a group, relative to the longest row of the group, to which it is padded."""
PROBE_LENGTHS = (7, 4, 6)
"""Lengths of the rows of the probe batch."""
TOLERANCE = 0.1
"""Maximum difference of the probe's hidden states from those of single rows, relative to the difference of one sequence
without row boundaries."""
GQA_ARGUMENTS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
"""Arguments of `varlen_attn` for grouped-query attention, which must be enabled explicitly in torch 2.13, but not in
2.11."""
MAX_HEAD_DIM = 256
"""Maximum head dimension of the varlen kernel, which also requires a multiple of 8 and an Ampere GPU or newer."""
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "indices")
"""Arguments that some models (Gemma 2, gpt-oss, T5, GLM with sparse attention) pass to their attention function."""


class UnsupportedAttention(Exception):
    """A model requires more than causal attention within rows."""


@dataclass(frozen=True)
class Layout:
    """Row boundaries in a batch of sequences, each of which consists of concatenated rows and padding."""

    starts: tuple[int, ...]
    """Index of the first token of each row, in the flattened batch."""
    lengths: tuple[int, ...]
    """Number of tokens of each row."""
    sequences: int
    """Number of sequences."""
    width: int
    """Number of tokens of a sequence, including padding."""

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]]) -> Layout:
        """Return the layout of sequences whose rows have these lengths."""
        width = max(map(sum, lengths))
        starts = [
            sequence * width + start
            for sequence, rows in enumerate(lengths)
            for start in list(accumulate(rows, initial=0))[: len(rows)]
        ]
        return cls(tuple(starts), tuple(chain.from_iterable(lengths)), len(lengths), width)

    def positions_bt(self) -> torch.Tensor:
        """Return position ids, (sequences, width) int64: from 0 in each row, and 0 on padding."""
        positions_n = torch.zeros(self.sequences * self.width, dtype=torch.long)
        for start, length in zip(self.starts, self.lengths, strict=True):
            positions_n[start : start + length] = torch.arange(length)
        return positions_n.view(self.sequences, self.width)

    def groups(self) -> list[list[tuple[int, int]]]:
        """Return groups of rows of similar length, as (start, length), longest rows first."""
        groups: list[list[tuple[int, int]]] = []
        for length, start in sorted(zip(self.lengths, self.starts, strict=True), reverse=True):
            if not groups or length < MIN_LENGTH_RATIO * groups[-1][0][1]:
                groups.append([])
            groups[-1].append((start, length))
        return groups

    def boundaries(self) -> tuple[list[int], int]:
        """Return the boundaries of rows in the flattened batch, ascending, and the length of the longest row. Padding
        counts as rows."""
        ends = {start + length for start, length in zip(self.starts, self.lengths, strict=True)}
        boundaries = sorted({*self.starts, *ends, *range(0, self.sequences * self.width + 1, self.width)})
        return boundaries, max(end - start for start, end in pairwise(boundaries))


@dataclass
class VarlenAttention:
    """Attention function for transformers: causal attention within each row of a batch, by the layout of `set_layout`.
    One instance per model."""

    _layout: Layout | None = None
    _device: torch.device | None = None
    _boundaries: torch.Tensor | None = None
    _max_length: int = 0
    _groups: list[torch.Tensor] = field(default_factory=list)
    """For each group of rows of similar length, the indices of their tokens in the flattened batch, (rows, tokens).
    Shorter rows are padded with their last token, to which earlier tokens do not attend."""
    _inverse_n: torch.Tensor | None = None
    """Index of each token of the batch in the concatenated outputs of the groups."""
    num_windowed: int = 0
    """Number of calls with a sliding window so far."""

    def set_layout(self, layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
        """Set the layout of the next forward and backward pass."""
        self._layout, self._device, self._inverse_n, self._boundaries = layout, device, None, None
        if dtype != torch.float32 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            boundaries, self._max_length = layout.boundaries()
            self._boundaries = torch.tensor(boundaries, dtype=torch.int32, device=device)

    def _build_groups(self) -> torch.Tensor:
        """Build the groups once for all layers; return `_inverse_n`."""
        if self._inverse_n is None:
            assert self._layout is not None, "set_layout was not called"
            inverse_n = torch.zeros(self._layout.sequences * self._layout.width, dtype=torch.long)
            self._groups, first = [], 0
            for group in self._layout.groups():
                max_length = group[0][1]
                indices = [start + torch.arange(max_length).clamp(max=length - 1) for start, length in group]
                self._groups.append(torch.stack(indices).to(self._device))
                for row, (start, length) in enumerate(group):
                    inverse_n[start : start + length] = first + row * max_length + torch.arange(length)
                first += len(group) * max_length
            self._inverse_n = inverse_n.to(self._device)
        return self._inverse_n

    def __call__(
        self,
        module: torch.nn.Module,
        query_bhtd: torch.Tensor,
        key_bhtd: torch.Tensor,
        value_bhtd: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the attention output, (batch, tokens, heads, head dim), and None. Raises UnsupportedAttention unless
        it is causal attention, with or without a sliding window.

        query_bhtd, key_bhtd, value_bhtd: (batch, heads, tokens, head dim).
        """
        if attention_mask is not None or any(kwargs.get(name) is not None for name in UNSUPPORTED_ARGUMENTS):
            raise UnsupportedAttention
        self.num_windowed += sliding_window is not None
        batch, heads, tokens, _ = query_bhtd.shape
        query_nhd, key_nhd, value_nhd = (
            tensor.transpose(1, 2).reshape(batch * tokens, tensor.shape[1], tensor.shape[-1])
            for tensor in (query_bhtd, key_bhtd, value_bhtd)
        )
        head_dim = query_bhtd.shape[-1]
        if (
            self._boundaries is not None
            and not dropout
            and head_dim == value_bhtd.shape[-1] <= MAX_HEAD_DIM
            and head_dim % 8 == 0
        ):
            out: Any = varlen_attn(
                query_nhd,
                key_nhd,
                value_nhd,
                self._boundaries,
                self._boundaries,
                self._max_length,
                self._max_length,
                scale=scaling,
                window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
                **GQA_ARGUMENTS,
            )
            return out.view(batch, tokens, heads, -1), None
        inverse_n = self._build_groups()
        repeats = heads // key_nhd.shape[1]
        outs = []
        for group in self._groups:
            rows, max_length = group.shape
            query, key, value = (
                tensor.index_select(0, group.flatten()).view(rows, max_length, *tensor.shape[1:]).transpose(1, 2)
                for tensor in (query_nhd, key_nhd, value_nhd)
            )
            if repeats > 1:
                key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
            mask = _window_mask(max_length, sliding_window, group.device)
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
            outs.append(attended.transpose(1, 2).reshape(rows * max_length, heads, -1))
        return torch.cat(outs).index_select(0, inverse_n).view(batch, tokens, heads, -1), None


def _window_mask(tokens: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask of a causal sliding window, (tokens, tokens) bool; None if no row is longer than the window."""
    if window is None or tokens <= window:
        return None
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def install_varlen_attention(model: Any) -> VarlenAttention | None:
    """Make a causal language model attend within rows only, and return its VarlenAttention. Return None and leave the
    model unchanged if its rows would not be independent."""
    from transformers import AttentionInterface

    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return None
    attention = VarlenAttention()
    name, original, was_training = f"tunery_rows_{id(attention)}", model.config._attn_implementation, model.training
    AttentionInterface.register(name, attention)
    model.eval()
    try:
        if _rows_are_independent(model, attention, name):
            return attention
    except (UnsupportedAttention, TypeError, ValueError):
        pass  # it requires other attention, or accepts no position ids or no other attention function
    finally:
        model.train(was_training)
    model.set_attn_implementation(original)
    return None


@torch.no_grad()
def _rows_are_independent(model: Any, attention: VarlenAttention, name: str) -> bool:
    """Whether the rows of a probe batch have the same hidden states as single rows."""
    vocab_size = model.config.get_text_config().vocab_size
    ids_n = torch.arange(sum(PROBE_LENGTHS), device=model.device).mul_(31).remainder_(vocab_size)

    def hidden_nh(ids_n: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model.base_model(input_ids=ids_n[None], **inputs).last_hidden_state[0]
        return hidden.float()

    single_rows = torch.cat([hidden_nh(row) for row in torch.split(ids_n, list(PROBE_LENGTHS))])
    without_boundaries = hidden_nh(ids_n)
    model.set_attn_implementation(name)
    layout = Layout.of([PROBE_LENGTHS])
    attention.set_layout(layout, model.device, model.dtype)
    attention.num_windowed = 0
    packed = hidden_nh(ids_n, position_ids=layout.positions_bt().to(model.device))
    # The rows of the probe are shorter than a window, so that hidden states do not show whether it is applied.
    if attention.num_windowed != _num_window_layers(model.config.get_text_config()):
        return False
    return bool((packed - single_rows).norm() <= TOLERANCE * (without_boundaries - single_rows).norm())


def _num_window_layers(config: Any) -> int:
    """Return the number of layers with sliding-window attention; -1 if there are other kinds of attention."""
    layer_types = getattr(config, "layer_types", None)
    has_other_types = set(layer_types or ()) - {"full_attention", "sliding_attention"}
    if getattr(config, "attention_chunk_size", None) or has_other_types:
        return -1
    if layer_types:
        return int(list(layer_types).count("sliding_attention"))
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return int(config.num_hidden_layers) if has_window else 0

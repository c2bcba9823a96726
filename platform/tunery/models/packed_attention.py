"""Attention over rows that are concatenated to one sequence, instead of padded to equal length.

A padded batch is often one third padding or more. All operations but attention work on single tokens and need no
padding, if position ids restart with each row. Attention gets the row boundaries, by transformers' interface for
attention functions (https://huggingface.co/docs/transformers/attention_interface). Whether a model uses that interface,
and keeps rows independent, is tested on a small probe batch.
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
"""Minimum length of a row in a group, relative to the group's longest row, which it is padded to."""
PROBE = (7, 4, 6)
"""Lengths of the rows of the probe batch."""
TOLERANCE = 0.1
"""Allowed difference of hidden states from those of single rows, relative to the difference without row boundaries."""
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""Grouped-query attention must be enabled explicitly in torch 2.13, but not in 2.11."""
MAX_HEAD_DIM = 256
"""Maximum head dimension of the varlen kernel, which also requires a multiple of 8 and an Ampere GPU or newer."""
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "indices")
"""Arguments that some models (Gemma 2, gpt-oss, T5, GLM with sparse attention) pass to their attention function."""


class UnsupportedAttention(Exception):
    """A model requires more than causal attention within rows."""


@dataclass(frozen=True)
class Layout:
    """Row boundaries in a batch of `sequences` sequences of `width` tokens each. `starts`: in the flattened batch."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    sequences: int
    width: int

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]]) -> Layout:
        """`lengths`: lengths of the rows of each sequence, in order."""
        width = max(map(sum, lengths))
        starts = [
            sequence * width + start
            for sequence, rows in enumerate(lengths)
            for start in list(accumulate(rows, initial=0))[: len(rows)]
        ]
        return cls(tuple(starts), tuple(chain.from_iterable(lengths)), len(lengths), width)

    def positions_bt(self) -> torch.Tensor:
        """Position ids, restarting with each row; 0 on padding."""
        positions_n = torch.zeros(self.sequences * self.width, dtype=torch.long)
        for start, length in zip(self.starts, self.lengths, strict=True):
            positions_n[start : start + length] = torch.arange(length)
        return positions_n.view(self.sequences, self.width)

    def groups(self) -> list[list[tuple[int, int]]]:
        """Group rows of similar length, (start, length) each, in descending order."""
        groups: list[list[tuple[int, int]]] = []
        for length, start in sorted(zip(self.lengths, self.starts, strict=True), reverse=True):
            if not groups or length < MIN_LENGTH_RATIO * groups[-1][0][1]:
                groups.append([])
            groups[-1].append((start, length))
        return groups

    def boundaries(self) -> tuple[list[int], int]:
        """Return the cumulative row boundaries, with padding as rows, and the length of the longest row."""
        ends = {start + length for start, length in zip(self.starts, self.lengths, strict=True)}
        boundaries = sorted({*self.starts, *ends, *range(0, self.sequences * self.width + 1, self.width)})
        return boundaries, max(end - start for start, end in pairwise(boundaries))


@dataclass
class VarlenAttention:
    """Causal attention within each row of a batch, by the layout passed to `set_layout`. One instance per model."""

    _layout: Layout | None = None
    _device: torch.device | None = None
    _boundaries: torch.Tensor | None = None
    _max_length: int = 0
    _groups: list[torch.Tensor] = field(default_factory=list)
    """For each group of rows of similar length, the indices of their tokens in the batch, (rows, tokens). Shorter rows
    are padded with their last token, which causal attention of earlier tokens ignores."""
    _inverse_n: torch.Tensor | None = None
    """Index of each token of the batch in the concatenated outputs of the groups."""
    num_windowed: int = 0
    """Number of calls with a sliding window."""

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
        """(batch, heads, tokens, dim) -> (batch, tokens, heads, dim). Raises UnsupportedAttention unless it is
        causal attention, with or without a sliding window."""
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
                **GROUPED,
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
    """Mask of a causal sliding window; None if no row is longer than the window."""
    if window is None or tokens <= window:
        return None
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def install_varlen_attention(model: Any) -> VarlenAttention | None:
    """Make a causal language model attend within rows, and return its VarlenAttention. Returns None and leaves the
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
    except (
        UnsupportedAttention,
        TypeError,
        ValueError,
    ):  # needs other attention, accepts no position ids, or no other attention function
        pass
    finally:
        model.train(was_training)
    model.set_attn_implementation(original)
    return None


@torch.no_grad()
def _rows_are_independent(model: Any, attention: VarlenAttention, name: str) -> bool:
    """Whether rows of a probe batch have the same hidden states as single rows."""
    vocabulary = model.config.get_text_config().vocab_size
    ids_n = torch.arange(sum(PROBE), device=model.device).mul_(31).remainder_(vocabulary)

    def hidden_nh(ids_n: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model.base_model(input_ids=ids_n[None], **inputs).last_hidden_state[0]
        return hidden.float()

    single_rows = torch.cat([hidden_nh(row) for row in torch.split(ids_n, list(PROBE))])
    as_one_sequence = hidden_nh(ids_n)
    model.set_attn_implementation(name)
    layout = Layout.of([PROBE])
    attention.set_layout(layout, model.device, model.dtype)
    attention.num_windowed = 0
    packed = hidden_nh(ids_n, position_ids=layout.positions_bt().to(model.device))
    if attention.num_windowed != _num_window_layers(
        model.config.get_text_config()
    ):  # the rows of the probe are shorter than the window
        return False
    return bool((packed - single_rows).norm() <= TOLERANCE * (as_one_sequence - single_rows).norm())


def _num_window_layers(config: Any) -> int:
    """Number of layers with sliding-window attention; -1 if there are other kinds of attention."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "attention_chunk_size", None) or set(kinds or ()) - {"full_attention", "sliding_attention"}:
        return -1
    if kinds:
        return int(list(kinds).count("sliding_attention"))
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return int(config.num_hidden_layers) if has_window else 0

"""Rows beside each other in one sequence, instead of below each other and filled up with padding.

A batch of rows as they come is padding to a third and more. What works on tokens (all but attention) needs none of it,
if positions begin anew with each row; attention is told where rows begin and end. It takes transformers' interface for
attention functions (https://huggingface.co/docs/transformers/attention_interface); whether a model goes by it, and
leaves each row alone, is found by trying.
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

ALIKE = 0.75
"""Of the longest row of a group: no shorter one is padded up to it."""
PROBE = (7, 4, 6)
"""Tokens of the rows that a model is tried with."""
TOLERANCE = 0.1
"""Of what the rows before it would make of a row's hidden states: as much may they differ by rounding."""
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""Fewer heads of keys than of queries: torch 2.13 wants to be told, 2.11 just takes them."""
LARGEST_HEAD = 256
"""Numbers of a head: more the kernel for rows of any length doesn't take, nor what is no multiple of 8 (nor a GPU from
before Ampere)."""
MORE_THAN_CAUSAL = ("softcap", "s_aux", "position_bias", "indices")
"""What some models (Gemma 2, gpt-oss, T5, GLM with sparse attention) hand to their attention function."""


class UnsupportedAttention(Exception):
    """A model wants more of its attention function than causal attention within rows."""


@dataclass(frozen=True)
class Layout:
    """Where rows lie in a batch of sequences of `width` tokens each, counted through the whole batch."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    sequences: int
    width: int

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]]) -> Layout:
        """`lengths`: of the rows of each sequence, one behind the other."""
        width = max(map(sum, lengths))
        starts = [
            number * width + start
            for number, rows in enumerate(lengths)
            for start in list(accumulate(rows, initial=0))[: len(rows)]
        ]
        return cls(tuple(starts), tuple(chain.from_iterable(lengths)), len(lengths), width)

    def positions_bt(self) -> torch.Tensor:
        """Of each token in its row; 0 for padding."""
        positions_n = torch.zeros(self.sequences * self.width, dtype=torch.long)
        for start, length in zip(self.starts, self.lengths, strict=True):
            positions_n[start : start + length] = torch.arange(length)
        return positions_n.view(self.sequences, self.width)

    def groups(self) -> list[list[tuple[int, int]]]:
        """Rows of like length, (start, length) each, the longest first."""
        found: list[list[tuple[int, int]]] = []
        for length, start in sorted(zip(self.lengths, self.starts, strict=True), reverse=True):
            if not found or length < ALIKE * found[-1][0][1]:
                found.append([])
            found[-1].append((start, length))
        return found

    def edges(self) -> tuple[list[int], int]:
        """Where each row begins, and the end of the last; padding counts as a row. And how long the longest is."""
        ends = {start + length for start, length in zip(self.starts, self.lengths, strict=True)}
        edges = sorted({*self.starts, *ends, *range(0, self.sequences * self.width + 1, self.width)})
        return edges, max(after - before for before, after in pairwise(edges))


@dataclass
class VarlenAttention:
    """Causal attention within each row of a batch whose layout it was told. One for each model."""

    _layout: Layout | None = None
    _device: torch.device | None = None
    _edges: torch.Tensor | None = None
    _longest: int = 0
    _groups: list[torch.Tensor] = field(default_factory=list)
    """Rows of like length: the place of each of their tokens, (rows, tokens). What a shorter row lacks is its last
    token again: nothing before it attends to that."""
    _back_n: torch.Tensor | None = None
    """Of each token of the batch, its place among the outputs of the groups."""
    windowed: int = 0
    """Calls with a window, so far."""

    def tell(self, layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
        """Of the next forward pass, and of its backward pass."""
        self._layout, self._device, self._back_n, self._edges = layout, device, None, None
        if dtype != torch.float32 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            edges, self._longest = layout.edges()
            self._edges = torch.tensor(edges, dtype=torch.int32, device=device)

    def _group(self) -> torch.Tensor:
        """Once for all layers."""
        if self._back_n is None:
            assert self._layout is not None, "no layout was told"
            back_n = torch.zeros(self._layout.sequences * self._layout.width, dtype=torch.long)
            self._groups, first = [], 0
            for group in self._layout.groups():
                longest = group[0][1]
                places = [start + torch.arange(longest).clamp(max=length - 1) for start, length in group]
                self._groups.append(torch.stack(places).to(self._device))
                for row, (start, length) in enumerate(group):
                    back_n[start : start + length] = first + row * longest + torch.arange(length)
                first += len(group) * longest
            self._back_n = back_n.to(self._device)
        return self._back_n

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
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        """(batch, heads, tokens, dim) -> (batch, tokens, heads, dim). Raises UnsupportedAttention for what is more than
        causal attention, with or without a window."""
        if attention_mask is not None or any(
            more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")
        ):
            raise UnsupportedAttention
        self.windowed += sliding_window is not None
        batch, heads, tokens, _ = query_bhtd.shape
        query_nhd, key_nhd, value_nhd = (
            every.transpose(1, 2).reshape(batch * tokens, every.shape[1], every.shape[-1])
            for every in (query_bhtd, key_bhtd, value_bhtd)
        )
        head = query_bhtd.shape[-1]
        if self._edges is not None and not dropout and head == value_bhtd.shape[-1] <= LARGEST_HEAD and head % 8 == 0:
            out: Any = varlen_attn(
                query_nhd,
                key_nhd,
                value_nhd,
                self._edges,
                self._edges,
                self._longest,
                self._longest,
                scale=scaling,
                window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
                **GROUPED,
            )
            return out.view(batch, tokens, heads, -1), None
        back_n = self._group()
        repeats = heads // key_nhd.shape[1]
        outs = []
        for group in self._groups:
            rows, longest = group.shape
            query, key, value = (
                every.index_select(0, group.flatten()).view(rows, longest, *every.shape[1:]).transpose(1, 2)
                for every in (query_nhd, key_nhd, value_nhd)
            )
            if repeats > 1:
                key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
            mask = _window(longest, sliding_window, group.device)
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
            outs.append(attended.transpose(1, 2).reshape(rows * longest, heads, -1))
        return torch.cat(outs).index_select(0, back_n).view(batch, tokens, heads, -1), None


def _window(tokens: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """None where no row is longer than the window."""
    if window is None or tokens <= window:
        return None
    place = torch.arange(tokens, device=device)
    behind = place[:, None] - place[None, :]
    return (behind >= 0) & (behind < window)


def install_varlen_attention(model: Any) -> VarlenAttention | None:
    """Has a causal language model attend within rows that its VarlenAttention is told of. None, and the model as it
    was, where it doesn't leave rows alone then."""
    from transformers import AttentionInterface

    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return None
    attention = VarlenAttention()
    name, before, trains = f"tunery_rows_{id(attention)}", model.config._attn_implementation, model.training
    AttentionInterface.register(name, attention)
    model.eval()
    try:
        if _leaves_rows_alone(model, attention, before, name):
            return attention
    except (
        UnsupportedAttention,
        TypeError,
        ValueError,
    ):  # it has other needs, takes no positions, or no other attention
        pass
    finally:
        model.train(trains)
    model.set_attn_implementation(before)
    return None


@torch.no_grad()
def _leaves_rows_alone(model: Any, attention: VarlenAttention, before: str, name: str) -> bool:
    vocabulary = model.config.get_text_config().vocab_size
    ids_n = torch.arange(sum(PROBE), device=model.device).mul_(31).remainder_(vocabulary)

    def hidden_nh(ids_n: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model.base_model(input_ids=ids_n[None], **inputs).last_hidden_state[0]
        return found.float()

    alone = torch.cat([hidden_nh(row) for row in torch.split(ids_n, list(PROBE))])
    as_one_row = hidden_nh(ids_n)
    model.set_attn_implementation(name)
    layout = Layout.of([PROBE])
    attention.tell(layout, model.device, model.dtype)
    attention.windowed = 0
    beside = hidden_nh(ids_n, position_ids=layout.positions_bt().to(model.device))
    if attention.windowed != _windows(model.config.get_text_config()):  # rows of the probe are too short to show it
        return False
    return bool((beside - alone).norm() <= TOLERANCE * (as_one_row - alone).norm())


def _windows(config: Any) -> int:
    """Layers that attend within a window; -1 where some do something else."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "attention_chunk_size", None) or set(kinds or ()) - {"full_attention", "sliding_attention"}:
        return -1
    if kinds:
        return int(list(kinds).count("sliding_attention"))
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return int(config.num_hidden_layers) if slides else 0

"""The adapters of all members of a pack in stacked tensors, and the linear layers that apply them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tunery.training.packed.adamw import StepHyperparams, update

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""LoRA matrices by name of the linear layer: A (rank, in features) and B (out features, rank), float32."""


@dataclass
class Adapter:
    """The LoRA adapter of one training with its AdamW moments, on the CPU."""

    weights: Matrices
    scale: float
    """alpha / rank."""
    exp_avg: Matrices = field(default_factory=dict)
    """First moments; zeros if not given."""
    exp_avg_sq: Matrices = field(default_factory=dict)
    """Second moments; zeros if not given."""

    def __post_init__(self) -> None:
        for moments in (self.exp_avg, self.exp_avg_sq):
            for name, pair in self.weights.items() if not moments else ():
                moments[name] = (torch.zeros_like(pair[0]), torch.zeros_like(pair[1]))


class StackedLinear(nn.Module):
    """A frozen linear layer (or an equivalent one, such as GPT-2's Conv1D) with the adapters of all members."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a_kri: nn.Parameter | None = None
        """A matrices scaled by alpha / rank, (members, rank, in)."""
        self.b_kor: nn.Parameter | None = None
        """B matrices, (members, out, rank)."""
        self.active: list[int] | None = None
        """Members whose rows are in the batch, in order and with equally many tokens each; None for all members."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return base(x) plus the output of the adapter of each row, (rows, tokens, out features). x: (rows, tokens, in
        features).

        There are only three matrix products, because on a GPU a step of a small batch is bound by kernel launches.
        """
        base_output: torch.Tensor = self.base(x)
        if self.a_kri is None or self.b_kor is None:
            return base_output
        a_kri: torch.Tensor = self.a_kri
        b_kor: torch.Tensor = self.b_kor
        if self.active is not None:
            a_kri, b_kor = a_kri[self.active], b_kor[self.active]
        num_members = len(a_kri)
        projected_knr = torch.bmm(x.reshape(num_members, -1, x.shape[-1]), a_kri.mT)
        base_output_kno = base_output.view(num_members, -1, base_output.shape[-1])
        return torch.baddbmm(base_output_kno, projected_knr, b_kor.mT).view_as(base_output)


class Stack:
    """Weights, gradients and AdamW moments of all adapters. Each is one float32 tensor (members, parameters), so that
    an AdamW step of all members takes few operations.

    The layers use a copy of the weights in their own `dtype`. Adapters are padded with zeros to the highest rank and to
    all adapted layers. Where both A and B are zero, gradients are zero too, so the padding stays zero.
    """

    def __init__(
        self,
        layers: Mapping[str, StackedLinear],
        adapters: Sequence[Adapter],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._layers, self._adapters = layers, adapters
        rank = max((len(a) for adapter in adapters for a, _ in adapter.weights.values()), default=0)
        self._shapes = {
            name: (pair[0].shape[1], pair[1].shape[0]) for adapter in adapters for name, pair in adapter.weights.items()
        }
        # All A matrices come before all B matrices, so that scaling A is one operation.
        self._b_start = rank * sum(in_features for in_features, _ in self._shapes.values())
        size = self._b_start + rank * sum(out_features for _, out_features in self._shapes.values())
        self._weights, self._grads, self._exp_avg, self._exp_avg_sq = (
            torch.zeros(len(adapters), size, device=device) for _ in range(4)
        )
        self._scales_k1 = torch.tensor([[adapter.scale] for adapter in adapters], device=device)
        self._copy = torch.zeros(len(adapters), size, device=device, dtype=dtype)
        self._copy_grads = self._grads if dtype == torch.float32 else torch.zeros_like(self._copy)
        self._slices: dict[str, tuple[slice, slice, int]] = {}
        start_a, start_b = 0, self._b_start
        for name, (in_features, out_features) in self._shapes.items():
            end_a, end_b = start_a + rank * in_features, start_b + rank * out_features
            self._slices[name] = (slice(start_a, end_a), slice(start_b, end_b), rank)
            start_a, start_b = end_a, end_b
        self._load_adapters()
        self._bind_layers()

    def _load_adapters(self) -> None:
        """Copy weights and moments of the adapters into the stacked tensors."""
        for stacked, matrices in self._stacked_tensors():
            for index, adapter in enumerate(self._adapters):
                for name, pair in matrices(adapter).items():
                    for view, matrix in zip(self._views(stacked, name), pair, strict=True):
                        view[index, : matrix.shape[0], : matrix.shape[1]] = matrix.to(stacked.device)

    def _bind_layers(self) -> None:
        """Set each layer's parameters and gradients to views of the stacked tensors."""
        for name, layer in self._layers.items():
            layer.a_kri = layer.b_kor = layer.active = None
            if name in self._slices:
                (a, b), (grad_a, grad_b) = self._views(self._copy, name), self._views(self._copy_grads, name)
                layer.a_kri, layer.b_kor = nn.Parameter(a), nn.Parameter(b)
                layer.a_kri.grad, layer.b_kor.grad = grad_a, grad_b
        self._refresh_copy()

    @torch.no_grad()
    def _refresh_copy(self) -> None:
        """Update the weights that the layers use: A scaled by alpha / rank, and B."""
        torch.mul(self._weights[:, : self._b_start], self._scales_k1, out=self._copy[:, : self._b_start])
        self._copy[:, self._b_start :].copy_(self._weights[:, self._b_start :])

    def activate(self, members: Sequence[int]) -> None:
        """Set the members whose rows are in the next batch, as indices into the adapters."""
        active = None if list(members) == list(range(len(self._adapters))) else list(members)
        for name in self._shapes:
            self._layers[name].active = active

    @torch.no_grad()
    def zero_grad(self) -> None:
        self._grads.zero_()
        self._copy_grads.zero_()

    @torch.no_grad()
    def accumulate_grads(self) -> None:
        """Add the gradients in `dtype` to those in float32. Call after each backward pass."""
        if self._copy_grads is not self._grads:
            self._grads.add_(self._copy_grads)
            self._copy_grads.zero_()

    @torch.no_grad()
    def step(self, hyperparams: StepHyperparams) -> list[float]:
        """Take an AdamW step; return the gradient norm of each member before clipping."""
        self._grads[:, : self._b_start].mul_(self._scales_k1)
        norms: list[float] = update(self._weights, self._grads, self._exp_avg, self._exp_avg_sq, hyperparams).tolist()
        self._refresh_copy()
        return norms

    @torch.no_grad()
    def sync_to_adapters(self) -> None:
        """Copy weights and moments from the stacked tensors back into the adapters."""
        for stacked, matrices in self._stacked_tensors():
            for index, adapter in enumerate(self._adapters):
                for name, pair in matrices(adapter).items():
                    for view, matrix in zip(self._views(stacked, name), pair, strict=True):
                        matrix.copy_(view[index, : matrix.shape[0], : matrix.shape[1]])

    def _stacked_tensors(self) -> list[tuple[torch.Tensor, Callable[[Adapter], Matrices]]]:
        """Return each stacked tensor with a function that returns the matrices of an adapter that belong to it."""
        return [
            (self._weights, lambda adapter: adapter.weights),
            (self._exp_avg, lambda adapter: adapter.exp_avg),
            (self._exp_avg_sq, lambda adapter: adapter.exp_avg_sq),
        ]

    def _views(self, stacked_kn: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of a layer's A, (members, rank, in features), and B, (members, out features, rank), in a stacked
        tensor."""
        a_slice, b_slice, rank = self._slices[name]
        in_features, out_features = self._shapes[name]
        num_members = len(self._adapters)
        a_kri = stacked_kn[:, a_slice].view(num_members, rank, in_features)
        b_kor = stacked_kn[:, b_slice].view(num_members, out_features, rank)
        return a_kri, b_kor


def install(model: nn.Module, names: Sequence[str]) -> dict[str, StackedLinear]:
    """Replace the linear layers `names` of a frozen model by StackedLinear layers; return the new layers by name."""
    layers = {}
    for name in names:
        parent, _, attribute = name.rpartition(".")
        layers[name] = StackedLinear(model.get_submodule(name))
        setattr(model.get_submodule(parent), attribute, layers[name])
    return layers

"""The adapters of a pack, one above the other, and the linear layers that add them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tunery.training.packed.adamw import Rates, update

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By the name of the linear layer: A, (rank, in), and B, (out, rank); float32."""


@dataclass
class Adapter:
    """One training's adapter, and what AdamW remembers of it. On the CPU, while it is in no stack."""

    weights: Matrices
    scale: float
    """alpha / rank."""
    first: Matrices = field(default_factory=dict)
    second: Matrices = field(default_factory=dict)

    def __post_init__(self) -> None:
        for moments in (self.first, self.second):
            for name, pair in self.weights.items() if not moments else ():
                moments[name] = (torch.zeros_like(pair[0]), torch.zeros_like(pair[1]))


class StackedLinear(nn.Module):
    """A frozen linear layer (or what acts as one, such as GPT-2's Conv1D), and the adapters of all members on it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a_kri: nn.Parameter | None = None
        """Times alpha / rank."""
        self.b_kor: nn.Parameter | None = None
        self.active: list[int] | None = None
        """Whose rows the batch holds, in their order, as many of each; None: everybody's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, in) -> (rows, tokens, out).

        Three matrix products and nothing else: on a GPU a step of a small batch takes as long as its operations take to
        be launched.
        """
        plain: torch.Tensor = self.base(x)
        if self.a_kri is None or self.b_kor is None:
            return plain
        a_kri: torch.Tensor = self.a_kri
        b_kor: torch.Tensor = self.b_kor
        if self.active is not None:
            a_kri, b_kor = a_kri[self.active], b_kor[self.active]
        k = len(a_kri)
        low_knr = torch.bmm(x.reshape(k, -1, x.shape[-1]), a_kri.mT)
        return torch.baddbmm(plain.view(k, -1, plain.shape[-1]), low_knr, b_kor.mT).view_as(plain)


class Stack:
    """Weights, gradients and moments of all adapters, each one tensor of (members, numbers), float32: a step of AdamW
    for all is a handful of operations. What the layers multiply by is a copy in their own `dtype`. Adapters of a lower
    rank, and those that leave a layer alone, are filled up with zeros: zeros on both sides of a product have no
    gradient, and stay."""

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
        # All A before all B, so that what is done to the ones is one operation.
        self._middle = rank * sum(inner for inner, _ in self._shapes.values())
        size = self._middle + rank * sum(outer for _, outer in self._shapes.values())
        self._weights, self._grads, self._first, self._second = (
            torch.zeros(len(adapters), size, device=device) for _ in range(4)
        )
        self._scales_k1 = torch.tensor([[adapter.scale] for adapter in adapters], device=device)
        self._copy = torch.zeros(len(adapters), size, device=device, dtype=dtype)
        self._grads_of_copy = self._grads if dtype == torch.float32 else torch.zeros_like(self._copy)
        self._places: dict[str, tuple[slice, slice, int]] = {}
        start_a, start_b = 0, self._middle
        for name, (inner, outer) in self._shapes.items():
            end_a, end_b = start_a + rank * inner, start_b + rank * outer
            self._places[name] = (slice(start_a, end_a), slice(start_b, end_b), rank)
            start_a, start_b = end_a, end_b
        self._fill()
        self._lend()

    def _fill(self) -> None:
        for whole, matrices in self._moments():
            for index, adapter in enumerate(self._adapters):
                for name, pair in matrices(adapter).items():
                    for view, own in zip(self._views(whole, name), pair, strict=True):
                        view[index, : own.shape[0], : own.shape[1]] = own.to(whole.device)

    def _lend(self) -> None:
        """To each layer its part, and where its gradients go."""
        for name, layer in self._layers.items():
            layer.a_kri = layer.b_kor = layer.active = None
            if name in self._places:
                (a, b), (grad_a, grad_b) = self._views(self._copy, name), self._views(self._grads_of_copy, name)
                layer.a_kri, layer.b_kor = nn.Parameter(a), nn.Parameter(b)
                layer.a_kri.grad, layer.b_kor.grad = grad_a, grad_b
        self._renew()

    @torch.no_grad()
    def _renew(self) -> None:
        """The copy that the layers multiply by."""
        torch.mul(self._weights[:, : self._middle], self._scales_k1, out=self._copy[:, : self._middle])
        self._copy[:, self._middle :].copy_(self._weights[:, self._middle :])

    def activate(self, members: Sequence[int]) -> None:
        """The next batch holds rows of these."""
        active = None if list(members) == list(range(len(self._adapters))) else list(members)
        for name in self._shapes:
            self._layers[name].active = active

    @torch.no_grad()
    def clear(self) -> None:
        self._grads.zero_()
        self._grads_of_copy.zero_()

    @torch.no_grad()
    def collect(self) -> None:
        """After each backward pass: gradients are added up in float32, whatever the layers' dtype."""
        if self._grads_of_copy is not self._grads:
            self._grads.add_(self._grads_of_copy)
            self._grads_of_copy.zero_()

    @torch.no_grad()
    def step(self, rates: Rates) -> list[float]:
        """Returns the gradients' norms before clipping, by member."""
        self._grads[:, : self._middle].mul_(self._scales_k1)
        norms: list[float] = update(self._weights, self._grads, self._first, self._second, rates).tolist()
        self._renew()
        return norms

    @torch.no_grad()
    def read_back(self) -> None:
        """What was learned, into the adapters."""
        for whole, matrices in self._moments():
            for index, adapter in enumerate(self._adapters):
                for name, pair in matrices(adapter).items():
                    for view, own in zip(self._views(whole, name), pair, strict=True):
                        own.copy_(view[index, : own.shape[0], : own.shape[1]])

    def _moments(self) -> list[tuple[torch.Tensor, Callable[[Adapter], Matrices]]]:
        """Each tensor that is kept, and where an adapter has its part of it."""
        return [
            (self._weights, lambda adapter: adapter.weights),
            (self._first, lambda adapter: adapter.first),
            (self._second, lambda adapter: adapter.second),
        ]

    def _views(self, whole_kn: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A, (k, r, in), and B, (k, out, r), within one of the tensors."""
        of_a, of_b, rank = self._places[name]
        inner, outer = self._shapes[name]
        count = len(self._adapters)
        return whole_kn[:, of_a].view(count, rank, inner), whole_kn[:, of_b].view(count, outer, rank)


def install(model: nn.Module, names: Sequence[str]) -> dict[str, StackedLinear]:
    """Puts a StackedLinear in the place of each of these linear layers of a frozen model; returns them by name."""
    layers = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        layers[name] = StackedLinear(model.get_submodule(name))
        setattr(model.get_submodule(parent), last, layers[name])
    return layers

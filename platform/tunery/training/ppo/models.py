"""The four models of PPO: policy, value model, reference, reward model.

Full fine-tuning holds each for itself. With LoRA there is one copy of the base weights: policy, value model and (where
it is an adapter on the same base) reward model are adapters on it, and the reference is the base with none of them.

What is trained, policy and value model, is one module under one DeepSpeed engine: one backward pass, one all-reduce,
one optimizer. They share no trained weight, so that is the same as two of each, but for the norm that gradients are
clipped by, which is that of both together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunery.models.nll import LOGIT_BYTES, head_is_plain
from tunery.training.ppo.losses import log_probs_of
from tunery.training.ppo.rollouts import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["policy", "language", "reference", "reward"]
POLICY, VALUE, REWARD = "default", "value", "reward"
"""Names of adapters. PEFT saves the one called `default` where it is looked for."""


class LanguageModel(nn.Module):
    """A causal language model, asked for the answers' tokens alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.plain = head_is_plain(model)
        self.sharded = False
        """Under ZeRO-3: then each use of the head is one of all workers."""

    def forward(
        self, batch: MicroBatch, temperature: float, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy, (tokens,) each (losses.log_probs_of)."""
        if not self.plain:
            logits_bsv = self.model(input_ids=batch.ids_bs, use_cache=False).logits
            logits_nv = logits_bsv.flatten(0, 1)[batch.places_n]
            return log_probs_of(logits_nv, batch.tokens_n, temperature, entropy_gradient)
        head = self.model.get_output_embeddings()
        states_nh, tokens_n = self.states(batch)[batch.places_n], batch.tokens_n

        def of(states_nh: torch.Tensor, tokens_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return log_probs_of(head(states_nh), tokens_n, temperature, entropy_gradient)

        pieces = self._pieces(len(tokens_n), states_nh.device)
        if pieces == 1:
            return of(states_nh, tokens_n)
        # Logits of all answers would be the most that a micro batch takes: a piece at a time, and once more in the
        # backward pass.
        parts = [
            checkpoint(of, *piece, use_reentrant=False)
            for piece in zip(states_nh.tensor_split(pieces), tokens_n.tensor_split(pieces), strict=True)
        ]
        log_probs, entropies = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(entropies)

    def _pieces(self, tokens: int, device: torch.device) -> int:
        """How often the head is used for so many tokens; as often by every worker where that gathers its weights."""
        piece = max(1, LOGIT_BYTES // (4 * int(self.model.config.get_text_config().vocab_size)))
        pieces = math.ceil(tokens / piece)
        if not self.sharded:
            return pieces
        most = torch.tensor(pieces, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most.item())

    def states(self, batch: MicroBatch) -> torch.Tensor:
        """(rows x longest, width): the last hidden states."""
        states_bsh: torch.Tensor = self.model.base_model(input_ids=batch.ids_bs, use_cache=False).last_hidden_state
        return states_bsh.flatten(0, 1)


class ScalarHead(nn.Module):
    """A number from a hidden state: the head of a value or reward model."""

    def __init__(self, width: int, *, generator: torch.Generator | None = None) -> None:
        """Weights from N(0, 1 / (width + 1)), bias 0 (Huang et al., detail "reward head initialisation")."""
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.mean, self.deviation = 0.0, 1.0
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(width + 1), generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states_nh: torch.Tensor) -> torch.Tensor:
        """(n,) in float32."""
        scalars: torch.Tensor = self.linear(states_nh.to(self.linear.weight.dtype))[:, 0].float()
        return (scalars - self.mean) / self.deviation

    def take(self, head: nn.Linear, mean: float, deviation: float) -> ScalarHead:
        """With the weights of a reward model's head, to give (output - mean) / deviation: as numbers, since in weights
        of bf16 they would be rounded."""
        with torch.no_grad():
            self.linear.weight.copy_(head.weight)
            if head.bias is not None:
                self.linear.bias.copy_(head.bias)
        self.mean, self.deviation = mean, deviation
        return self


class ScalarModel(nn.Module):
    """A model without its head, and a scalar head of its own: a value model or a reward model."""

    def __init__(self, model: nn.Module, head: ScalarHead) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, ids_bs: torch.Tensor, places_n: torch.Tensor) -> torch.Tensor:
        """(n,): the number at each place in the flattened (rows x longest)."""
        states_bsh = self.model(input_ids=ids_bs, use_cache=False).last_hidden_state
        scalars: torch.Tensor = self.head(states_bsh.flatten(0, 1)[places_n])
        return scalars


class PolicyAndValue(nn.Module):
    """What DeepSpeed trains. Asked through its engine, and so through this forward pass, under every ZeRO stage.

    With adapters, `policy` holds the base and all of them, `value` is None, and there are heads for what is no language
    model; without, `policy` and `value` are models of their own.
    """

    def __init__(
        self,
        policy: LanguageModel,
        value: ScalarModel | None,
        heads: dict[str, ScalarHead] | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.value = policy, value
        self.heads = nn.ModuleDict(heads or {})
        self.adapted = adapted_layers(policy.model) if value is None else []
        for layer in self.adapted:
            layer._active_adapter, layer._disable_adapters = [POLICY], False

    @property
    def shared(self) -> bool:
        return self.value is None

    def forward(
        self, role: Role, batch: MicroBatch, temperature: float = 1.0, entropy_gradient: bool = False
    ) -> dict[str, torch.Tensor]:
        """policy: `log_probs`, `entropy` and `values`, (tokens,) each; language: the policy's `log_probs` alone. Of
        shared weights besides: reference: `log_probs`; reward: `scores`, (rows,)."""
        if role == "policy":
            with self.using(POLICY):
                log_probs_n, entropy_n = self.policy(batch, temperature, entropy_gradient)
            return {"log_probs": log_probs_n, "entropy": entropy_n, "values": self._values(batch)}
        if role in ("language", "reference"):
            with self.using(POLICY if role == "language" else None):
                return {"log_probs": self.policy(batch, temperature)[0]}
        assert role == "reward", role
        with self.using(REWARD):
            return {"scores": self.heads[REWARD](self.policy.states(batch)[batch.last_b])}

    def checkpoint_gradients(self) -> None:
        """Activations are worked out once more in the backward pass instead of being kept."""
        how: dict[str, Any] = {"use_reentrant": False}
        if self.shared:
            how["context_fn"] = recomputed_as_before(self.adapted)
            self.policy.model.enable_input_require_grads()
        self.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        if self.value is not None:
            model: Any = self.value.model
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    def _values(self, batch: MicroBatch) -> torch.Tensor:
        if self.value is not None:
            values_n: torch.Tensor = self.value(batch.ids_bs, batch.places_n)
            return values_n
        with self.using(VALUE):
            shared_n: torch.Tensor = self.heads[VALUE](self.policy.states(batch)[batch.places_n])
        return shared_n

    def using(self, adapter: str | None) -> AbstractContextManager[None]:
        """The shared weights with this adapter, or with none. Nothing where nothing is shared."""
        return activated(self.adapted, adapter) if self.shared else nullcontext()


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def activated(layers: list[Any], adapter: str | None) -> Iterator[None]:
    """One adapter of several in use, or none.

    Not by PEFT's set_adapter (0.21): that takes requires_grad from all others, and a weight without it gets no gradient
    from a backward pass that comes later.
    """
    before = (layers[0]._active_adapter, layers[0]._disable_adapters)  # all of them are switched together
    _switch(layers, [adapter or POLICY], adapter is None)
    try:
        yield
    finally:
        _switch(layers, *before)


def _switch(layers: list[Any], active: list[str], disabled: bool) -> None:
    if (layers[0]._active_adapter, layers[0]._disable_adapters) != (active, disabled):
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = active, disabled


def recomputed_as_before(layers: list[Any]) -> Callable[[], tuple[Any, Any]]:
    """For gradient checkpointing of shared weights (`context_fn` of torch.utils.checkpoint): a layer that is computed
    again in the backward pass uses the adapter that it used at first."""

    def contexts() -> tuple[Any, Any]:
        now = None if layers[0]._disable_adapters else layers[0]._active_adapter[0]
        return nullcontext(), activated(layers, now)

    return contexts


def without_dropout(model: nn.Module) -> None:
    """For good: with dropout, old and new probabilities of a token differ before any update (Huang et al., detail
    "dropout"). Many of transformers' modules keep theirs as a number (`attention_dropout`, `hidden_dropout`, ..)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name):
                setattr(module, name, 0.0)


def held_bytes(weights: Iterable[nn.Parameter]) -> int:
    """Each once; of one that ZeRO-3 has sharded its whole size."""
    once = {id(one): one for one in weights}
    return sum(int(getattr(one, "ds_numel", one.numel())) * one.element_size() for one in once.values())

"""The four models of PPO: policy, value model, reference model and reward model.

Full fine-tuning loads four separate models. With LoRA all share one copy of the base weights: policy and value model
are adapters, the reward model too if it was trained as an adapter on the same base, and the reference is the base
without adapters.

The policy and the value model are trained as one module under one DeepSpeed engine: one backward pass, one all-reduce,
one optimizer. They share no trained weights, so this equals two engines, except that gradients are clipped by the norm
of both together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tunery.models.token_log_probs import Entropy, TokenLogProbs
from tunery.training.ppo.rollouts import MicroBatch
from tunery.training.training_stats import num_elements

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["policy", "language", "reference", "reward"]
POLICY, VALUE, REWARD = "default", "value", "reward"
"""Adapter names. PEFT saves the adapter called `default` to the top level of the folder, where loaders expect it."""


class LanguageModel(nn.Module):
    """A causal language model whose forward pass returns log-probabilities and entropies of response tokens."""

    def __init__(self, model: PreTrainedModel, fuse_frozen_head: bool = True) -> None:
        super().__init__()
        self.model, self.log_probs = model, TokenLogProbs(model, fuse_frozen_head)

    def forward(
        self, batch: MicroBatch, temperature: float, entropy: Entropy = "none"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return log-probability and entropy of the response tokens, each (tokens,) float32 in nats. The entropy is
        None if it is not requested.

        `temperature` is that of the sampler. Its top_p and min_new_tokens are not applied: the probability ratios of
        PPO are those of the model's own distribution.
        """
        inputs = {"input_ids": batch.ids_bs}
        return self.log_probs(inputs, batch.state_indices_n, batch.tokens_n, temperature, entropy)

    def states(self, batch: MicroBatch) -> torch.Tensor:
        """Return the last hidden states, flattened to (responses x max length, hidden size)."""
        states_bsh: torch.Tensor = self.model.base_model(input_ids=batch.ids_bs, use_cache=False).last_hidden_state
        return states_bsh.flatten(0, 1)


class ScalarHead(nn.Module):
    """A linear head with one output, for value and reward models."""

    def __init__(self, hidden_size: int) -> None:
        """Initialize weights from N(0, 1 / (hidden_size + 1)) and the bias with 0 (Huang et al., detail "reward head
        initialisation")."""
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        self.mean, self.std = 0.0, 1.0
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(hidden_size + 1))
        nn.init.zeros_(self.linear.bias)

    def forward(self, states_nh: torch.Tensor) -> torch.Tensor:
        """Return (output - mean) / std of each hidden state, (n,) float32. states_nh: (n, hidden size)."""
        scalars: torch.Tensor = self.linear(states_nh.to(self.linear.weight.dtype))[:, 0].float()
        return (scalars - self.mean) / self.std

    def load_from(self, head: nn.Linear, mean: float, std: float) -> ScalarHead:
        """Copy the weights of a reward model's head, set its normalization, and return this head. `mean` and `std` are
        Python floats, because DeepSpeed would round tensors to bf16."""
        with torch.no_grad():
            self.linear.weight.copy_(head.weight)
            if head.bias is not None:
                self.linear.bias.copy_(head.bias)
        self.mean, self.std = mean, std
        return self


class ScalarModel(nn.Module):
    """A backbone with a scalar head: a value model or a reward model."""

    def __init__(self, model: nn.Module, head: ScalarHead) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, ids_bs: torch.Tensor, indices_n: torch.Tensor) -> torch.Tensor:
        """Return the scalar of each token with an index in `indices_n`, (n,) float32. ids_bs: (responses, max length);
        indices_n: (n,), into the flattened `ids_bs`."""
        states_bsh = self.model(input_ids=ids_bs, use_cache=False).last_hidden_state
        scalars: torch.Tensor = self.head(states_bsh.flatten(0, 1)[indices_n])
        return scalars


class PolicyAndValue(nn.Module):
    """The module that DeepSpeed trains. Every forward pass goes through its engine, as ZeRO-3 requires.

    With adapters, `policy` contains the base and all adapters, `value` is None, and `heads` has the scalar heads of the
    value and reward adapters. Otherwise `policy` and `value` are separate models.
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
        self.adapter_layers = find_adapter_layers(policy.model) if value is None else []
        for layer in self.adapter_layers:
            layer._active_adapter, layer._disable_adapters = [POLICY], False

    @property
    def shared(self) -> bool:
        """Whether the models are adapters on one base."""
        return self.value is None

    def forward(
        self, role: Role, batch: MicroBatch, temperature: float = 1.0, entropy: Entropy = "none"
    ) -> dict[str, torch.Tensor]:
        """Return the outputs of a model, by its role.

        policy: `log_probs`, `values` and, if requested, `entropy`, each (tokens,) float32. language: only `log_probs`
        of the policy. With adapters also reference: `log_probs`, (tokens,); reward: `scores`, (responses,).
        """
        if role == "policy":
            with self.with_adapter(POLICY):
                log_probs_n, entropy_n = self.policy(batch, temperature, entropy)
            outputs = {"log_probs": log_probs_n, "values": self._values(batch)}
            return outputs if entropy_n is None else {**outputs, "entropy": entropy_n}
        if role in ("language", "reference"):
            with self.with_adapter(POLICY if role == "language" else None):
                return {"log_probs": self.policy(batch, temperature)[0]}
        assert role == "reward", role
        with self.with_adapter(REWARD):
            return {"scores": self.heads[REWARD](self.policy.states(batch)[batch.last_b])}

    def checkpoint_gradients(self) -> None:
        """Enable gradient checkpointing for the policy and the value model."""
        kwargs: dict[str, Any] = {"use_reentrant": False}
        if self.shared:
            kwargs["context_fn"] = recompute_with_same_adapter(self.adapter_layers)
            self.policy.model.enable_input_require_grads()
        self.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if self.value is not None:
            model: Any = self.value.model
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def _values(self, batch: MicroBatch) -> torch.Tensor:
        values_n: torch.Tensor
        if self.value is not None:
            values_n = self.value(batch.ids_bs, batch.state_indices_n)
            return values_n
        with self.with_adapter(VALUE):
            values_n = self.heads[VALUE](self.policy.states(batch)[batch.state_indices_n])
        return values_n

    def with_adapter(self, adapter: str | None) -> AbstractContextManager[None]:
        """Return a context in which `adapter` is active (None: no adapter). It does nothing for separate models."""
        return active_adapter(self.adapter_layers, adapter) if self.shared else nullcontext()


def find_adapter_layers(model: nn.Module) -> list[Any]:
    """Return all PEFT layers of `model`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def active_adapter(layers: list[Any], adapter: str | None) -> Iterator[None]:
    """A context in which one of several adapters is active, or none.

    PEFT's set_adapter (0.21) is not used: it sets requires_grad to False for all other adapters, which would then get
    no gradient in a later backward pass.
    """
    previous = (layers[0]._active_adapter, layers[0]._disable_adapters)  # the same in all layers
    _set_active(layers, [adapter or POLICY], adapter is None)
    try:
        yield
    finally:
        _set_active(layers, *previous)


def _set_active(layers: list[Any], active: list[str], disabled: bool) -> None:
    if (layers[0]._active_adapter, layers[0]._disable_adapters) != (active, disabled):
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = active, disabled


def recompute_with_same_adapter(layers: list[Any]) -> Callable[[], tuple[Any, Any]]:
    """Return a `context_fn` for torch.utils.checkpoint. With it, the recomputation in the backward pass uses the
    adapter that was active in the forward pass."""

    def contexts() -> tuple[Any, Any]:
        current = None if layers[0]._disable_adapters else layers[0]._active_adapter[0]
        return nullcontext(), active_adapter(layers, current)

    return contexts


def disable_dropout(model: nn.Module) -> None:
    """Set all dropout probabilities to 0. With dropout, old and new log-probabilities would differ before any update
    (Huang et al., detail "dropout"). Many modules of transformers store the probability as a float attribute, such as
    `attention_dropout`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name):
                setattr(module, name, 0.0)


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the total size of parameters. Shared parameters count once; a parameter sharded by ZeRO-3 counts with its
    full size."""
    unique = {id(parameter): parameter for parameter in parameters}
    return sum(num_elements(parameter) * parameter.element_size() for parameter in unique.values())

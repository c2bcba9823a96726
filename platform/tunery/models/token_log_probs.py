"""Log-probabilities of tokens under a causal language model, without holding the logits of a batch in memory.

The logits are the largest tensor of a small model. The head is applied only to the hidden states that predict the
requested tokens, in chunks of tokens. How the chunks get a gradient depends on the head:

- A frozen head: log-probabilities and their gradient are computed together, since the log-probability of a token
  depends only on one hidden state. This takes two matrix products with the head instead of three, and keeps no logits.
- A trained head, or one that ZeRO-3 shards: the logits of each chunk are recomputed in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Entropy = Literal["none", "value", "gradient"]
"""Whether to compute the entropy of the tokens' distributions: not, without gradient, or with gradient."""
LOGIT_BYTES = 1 << 28
"""Maximum bytes of float32 logits of a chunk that is recomputed in the backward pass."""
FROZEN_HEAD_LOGIT_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""The same for a frozen head. Small on a CPU, so that the logits stay in its caches."""


class TokenLogProbs:
    """Computes log-probabilities of selected tokens of a batch and, if requested, entropies."""

    def __init__(self, model: PreTrainedModel, fuse_frozen_head: bool = True) -> None:
        """fuse_frozen_head: with False, results are rounded exactly as those of a trained head."""
        self._model, self._fuse_frozen_head = model, fuse_frozen_head
        self.has_plain_head = head_is_plain(model)
        """Whether the output head alone gives the logits. Otherwise (Gemma caps its logits, Cohere scales them) the
        model computes the logits of all tokens at once."""
        self.sharded = False
        """Whether ZeRO-3 shards the weights. All workers then call the head equally often."""

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        state_indices_n: torch.Tensor,
        targets_n: torch.Tensor,
        temperature: float = 1.0,
        entropy: Entropy = "none",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return log-probability and entropy (None if not requested) of each token in nats, (n,) float32.

        inputs: those of the model, each (rows, length). state_indices_n: (n,) int64, index in the flattened (rows x
        length) of the hidden state that predicts each token. targets_n: (n,) int64, the tokens. temperature: divides
        the logits.
        """
        if not self.has_plain_head:
            logits_bv = self._model(**inputs, use_cache=False).logits.flatten(0, 1)
            return log_probs_of(logits_bv[state_indices_n], targets_n, temperature, entropy)
        hidden_bth = self._model.base_model(**inputs, use_cache=False).last_hidden_state
        hidden_nh = hidden_bth.flatten(0, 1).index_select(0, state_indices_n)
        head = self._model.get_output_embeddings()
        is_fused = self._fuse_frozen_head and not any(weight.requires_grad for weight in head.parameters())
        if is_fused and not self.sharded and isinstance(head, nn.Linear):
            return frozen_head_log_probs(hidden_nh, head, targets_n, temperature, entropy)

        def chunk_log_probs(hidden_mh: torch.Tensor, targets_m: torch.Tensor) -> Any:
            return log_probs_of(head(hidden_mh), targets_m, temperature, entropy)

        num_chunks = self._num_chunks(len(targets_n), hidden_nh.device)
        if num_chunks == 1:
            log_probs_n, entropy_n = chunk_log_probs(hidden_nh, targets_n)
            return log_probs_n, entropy_n
        chunks = [
            checkpoint(chunk_log_probs, *chunk, use_reentrant=False)
            for chunk in zip(hidden_nh.tensor_split(num_chunks), targets_n.tensor_split(num_chunks), strict=True)
        ]
        log_probs, entropies = zip(*chunks, strict=True)
        return torch.cat(log_probs), None if entropy == "none" else torch.cat(entropies)

    def _num_chunks(self, tokens: int, device: torch.device) -> int:
        """Return the number of head calls for so many tokens; under ZeRO-3 the maximum over all workers."""
        chunk_size = max(1, LOGIT_BYTES // (4 * int(self._model.config.get_text_config().vocab_size)))
        num_chunks = math.ceil(tokens / chunk_size)
        if not self.sharded:
            return num_chunks
        max_chunks = torch.tensor(num_chunks, device=device)
        dist.all_reduce(max_chunks, dist.ReduceOp.MAX)
        return int(max_chunks.item())


def log_probs_of(
    logits_nv: torch.Tensor, targets_n: torch.Tensor, temperature: float = 1.0, entropy: Entropy = "none"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probability and entropy of each token as TokenLogProbs does, from its logits, (n, vocabulary)."""
    logits_nv = logits_nv.float()
    if temperature != 1.0:
        logits_nv = logits_nv / temperature
    norm_n = logits_nv.logsumexp(dim=1)
    log_probs_n = logits_nv.gather(1, targets_n[:, None])[:, 0] - norm_n
    if entropy == "none":
        return log_probs_n, None
    with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
        all_log_probs_nv = logits_nv - norm_n[:, None]
        return log_probs_n, -(all_log_probs_nv.exp() * all_log_probs_nv).sum(dim=1)


def frozen_head_log_probs(
    hidden_nh: torch.Tensor,
    head: nn.Module,
    targets_n: torch.Tensor,
    temperature: float = 1.0,
    entropy: Entropy = "none",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probability and entropy of each token as TokenLogProbs does, from the hidden state that predicts it.

    hidden_nh: (n, hidden size); head: a linear layer, with or without bias, which gets no gradient.
    """
    bias: torch.Tensor | None = getattr(head, "bias", None)
    log_probs_n, entropy_n = _FrozenHeadLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden_nh, head.weight, bias, targets_n, temperature, entropy
    )
    return log_probs_n, None if entropy == "none" else entropy_n


class _FrozenHeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nh: torch.Tensor,
        weight_vh: torch.Tensor,
        bias_v: torch.Tensor | None,
        targets_n: torch.Tensor,
        temperature: float,
        entropy: Entropy,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        has_grad: bool = ctx.needs_input_grad[0]
        has_entropy, entropy_has_grad = entropy != "none", entropy == "gradient" and has_grad
        count = len(targets_n)
        log_probs_n = torch.empty(count, device=hidden_nh.device)
        entropy_n = torch.empty(count if has_entropy else 0, device=hidden_nh.device)
        grads_nh = torch.empty_like(hidden_nh if has_grad else hidden_nh[:0])
        entropy_grads_nh = torch.empty_like(hidden_nh if entropy_has_grad else hidden_nh[:0])
        chunk_size = max(1, FROZEN_HEAD_LOGIT_BYTES[hidden_nh.device.type] // (4 * len(weight_vh)))
        for start in range(0, count, chunk_size):
            chunk = slice(start, start + chunk_size)
            logits_mv = linear(hidden_nh[chunk], weight_vh, bias_v).float()
            if temperature != 1.0:
                logits_mv = logits_mv.div_(temperature)
            logits_mv.sub_(logits_mv.amax(1, keepdim=True))
            targets_m1 = targets_n[chunk, None]
            target_m = logits_mv.gather(1, targets_m1)[:, 0]
            probs_mv = logits_mv.exp() if has_entropy else logits_mv.exp_()
            sums_m = probs_mv.sum(1)
            norm_m = sums_m.log()
            log_probs_n[chunk] = target_m - norm_m
            if has_entropy or has_grad:
                probs_mv.div_(sums_m[:, None])
            if has_entropy:
                entropy_m = norm_m - (probs_mv * logits_mv).sum(1)
                entropy_n[chunk] = entropy_m
                if entropy_has_grad:
                    # d entropy / d logits: -p (log p + entropy).
                    logits_mv.add_((entropy_m - norm_m)[:, None]).mul_(probs_mv)
                    entropy_grads_nh[chunk] = logits_mv.to(weight_vh.dtype) @ weight_vh
            if has_grad:
                # d log p / d logits: one-hot minus p. It is stored with the opposite sign.
                probs_mv.scatter_add_(1, targets_m1, torch.full_like(sums_m, -1.0)[:, None])
                grads_nh[chunk] = probs_mv.to(weight_vh.dtype) @ weight_vh
        ctx.save_for_backward(grads_nh, entropy_grads_nh)
        ctx.temperature, ctx.entropy_has_grad = temperature, entropy_has_grad
        if not entropy_has_grad:
            ctx.mark_non_differentiable(entropy_n)
        return log_probs_n, entropy_n

    @staticmethod
    def backward(ctx: Any, grad_n: torch.Tensor, entropy_grad_n: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads_nh, entropy_grads_nh = ctx.saved_tensors
        total_nh = grads_nh * (-grad_n / ctx.temperature)[:, None]
        if ctx.entropy_has_grad:
            total_nh = total_nh - entropy_grads_nh * (entropy_grad_n / ctx.temperature)[:, None]
        return total_nh.to(grads_nh.dtype), None, None, None, None, None


def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether applying the output head to the base model's hidden states gives the model's logits."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
        head_logits = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    return head_logits.shape == logits.shape and torch.allclose(
        head_logits.float(), logits.float(), rtol=1e-3, atol=1e-4
    )

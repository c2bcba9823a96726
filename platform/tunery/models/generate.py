"""Generation: the interface of an engine, and the engine on transformers' forward pass.

Continuous batching (Yu et al. 2022, "Orca", https://www.usenix.org/conference/osdi22/presentation/yu): finished rows
are evicted from the batch and pending prompts take their slots, so that a long response does not block others. The
longest prompts are started first, so that prompts of similar length, padded on the left, are prefilled together.

Another engine, such as vLLM, is one more class with the same `__call__`. Import it lazily, as an optional dependency.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tunery.errors import TuneryError
from tunery.models.chat_template import chat_template_of
from tunery.models.decoding import DecodingBatch
from tunery.models.sampling import sample
from tunery.spec import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LOGITS = 1 << 28
"""Maximum rows x vocabulary size of a batch: sampling takes about 20 bytes per logit."""
EVICT_FRACTION = 0.1
"""Fraction of a batch that must have finished before its rows are evicted and pending prompts join. Larger values leave
slots empty for longer; smaller ones copy the cache more often."""
BATCH_TOKENS = {"cpu": 8_192, "cuda": 131_072}
"""Tokens in the KV cache of a batch, by device: rows x (longest prompt + max_new_tokens)."""


@dataclass(frozen=True)
class Response:
    """A generated response."""

    tokens: list[int]
    """Token ids, including the EOS token if it was sampled."""
    log_probs: list[float]
    """Log-probability of each token under the distribution that it was sampled from."""
    ended: bool
    """Whether it ends with an EOS token; otherwise it was truncated after max_new_tokens."""


class Engine(Protocol):
    """A generation engine."""

    def __call__(self, prompts: Sequence[list[int]], uniform_bt: torch.Tensor, sampling: Sampling) -> list[Response]:
        """Sample a response to each prompt.

        prompts: token ids; uniform_bt: (prompts, max_new_tokens) float64 in [0, 1), the random number of each token
        (models/sampling.py). An engine with its own random number generator must seed it with them.
        """
        ...


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all tokens that end a response of the model (see `stop_token_ids`). Raises TuneryError if there is
    none."""
    return stop_token_ids(getattr(model.generation_config, "eos_token_id", None), tokenizer)


def stop_token_ids(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all tokens that end a response, ascending. Raises TuneryError if there is none.

    They are the EOS tokens in the generation config (`configured`), the EOS token of the tokenizer, and the end tokens
    of the chat template: in Qwen base models that is `<|im_end|>`, but the tokenizer has `<|endoftext|>`.
    """
    template_tokens = chat_template_of(tokenizer).profile.end_tokens if tokenizer.chat_template else ()
    template_ids = tokenizer.convert_tokens_to_ids(list(template_tokens))
    configured_ids = configured if isinstance(configured, list) else [configured]
    stop_ids = sorted(
        {token for token in (tokenizer.eos_token_id, *template_ids, *configured_ids) if token is not None}
    )
    if not stop_ids:
        raise TuneryError(
            "the model has no EOS token: a response would never end",
            cause="neither its chat template, nor its tokenizer, nor its generation config has one",
            remedy="set `eos_token` in its tokenizer_config.json",
        )
    return stop_ids


def set_eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the EOS tokens in the model's generation config, at which `generate` stops."""
    model.generation_config.eos_token_id = eos_token_ids(model, tokenizer)


def decode_response(response: Sequence[int], stop_ids: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a response to text, without its final EOS token and other special tokens."""
    tokens = response[:-1] if response[-1] in stop_ids else response
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TransformersEngine:
    """Continuous batching with a KV cache, by the model's own forward pass."""

    def __init__(self, model: Any, stop_ids: Sequence[int], batch_tokens: int | None = None) -> None:
        """model: a causal language model on its device; stop_ids: tokens that end a response; batch_tokens: maximum
        number of tokens in the KV cache of a batch."""
        self._model, self._stop_ids = model, list(stop_ids)
        self._batch_tokens = batch_tokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], uniform_bt: torch.Tensor, sampling: Sampling) -> list[Response]:
        if not prompts:
            return []
        device = next(self._model.parameters()).device
        sampler = _SamplerState(len(prompts), uniform_bt.to(device), sampling, self._stop_ids)
        pending = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # the longest is popped first
        max_rows = self._max_rows(len(prompts[pending[-1]]) + sampling.max_new_tokens, device)
        batch: DecodingBatch | None = None
        while pending or batch is not None:
            free = max_rows - (0 if batch is None else len(batch.rows_b))
            if pending and (batch is None or (batch.can_merge and free >= EVICT_FRACTION * max_rows)):
                started = [pending.pop() for _ in range(min(free, len(pending)))]
                new = DecodingBatch.from_prompts(started, list(prompts), self._model.config, device)
                sampler.step(new, self._model)
                if batch is None:
                    batch = new
                else:
                    batch.merge(new)
            elif batch is not None:
                sampler.step(batch, self._model)
            assert batch is not None
            num_active = int(batch.active_b.sum())
            if num_active == 0:
                batch = None
            elif num_active <= (1 - EVICT_FRACTION) * len(batch.rows_b):
                batch.evict_finished()
        return list(sampler.responses())

    def _max_rows(self, width: int, device: torch.device) -> int:
        """Return the maximum number of rows in a batch whose rows have at most `width` tokens."""
        batch_tokens = self._batch_tokens or BATCH_TOKENS[device.type]
        max_rows: int = MAX_LOGITS // self._model.config.get_text_config().vocab_size
        return max(1, min(max_rows, batch_tokens // width))


class _SamplerState:
    """The tokens sampled so far, of all responses."""

    def __init__(self, rows: int, uniform_bt: torch.Tensor, sampling: Sampling, stop_ids: list[int]) -> None:
        """rows: number of responses; uniform_bt: (rows, max_new_tokens), on the model's device."""
        self._uniform_bt, self._sampling, self._stop_ids = uniform_bt, sampling, stop_ids
        self._stop_ids_e = torch.tensor(stop_ids, device=uniform_bt.device)
        self._tokens_bt = torch.full((rows, sampling.max_new_tokens), -1, device=uniform_bt.device)
        self._log_probs_bt = torch.zeros(rows, sampling.max_new_tokens, device=uniform_bt.device)

    def step(self, batch: DecodingBatch, model: Any) -> None:
        """Sample the next token of each row. Tokens of rows that have finished but are not evicted yet are
        discarded."""
        max_new_tokens = self._sampling.max_new_tokens
        logits_bv = batch.forward(model).float()
        if self._stop_ids and self._sampling.min_new_tokens:
            too_short_b1 = (batch.num_tokens_b < self._sampling.min_new_tokens)[:, None]
            logits_bv[:, self._stop_ids_e] = logits_bv[:, self._stop_ids_e].masked_fill(too_short_b1, -torch.inf)
        index = (batch.rows_b, batch.num_tokens_b.clamp(max=max_new_tokens - 1))
        tokens_b, log_prob_b = sample(logits_bv, self._uniform_bt[index], self._sampling)
        self._tokens_bt[index] = torch.where(batch.active_b, tokens_b, self._tokens_bt[index])
        self._log_probs_bt[index] = torch.where(batch.active_b, log_prob_b, self._log_probs_bt[index])
        finished_b = torch.isin(tokens_b, self._stop_ids_e) | (batch.num_tokens_b + 1 >= max_new_tokens)
        batch.append(tokens_b, finished_b)

    def responses(self) -> Iterator[Response]:
        """Yield the responses in the order of their prompts."""
        for tokens, log_probs in zip(self._tokens_bt.tolist(), self._log_probs_bt.tolist(), strict=True):
            length = tokens.index(-1) if -1 in tokens else len(tokens)
            yield Response(tokens[:length], log_probs[:length], tokens[length - 1] in self._stop_ids)

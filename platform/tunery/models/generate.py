"""Answers of a model to prompts: what an engine for it must do, and the one that ships, on transformers' forward pass.

Continuous batching (Yu et al. 2022, "Orca"): a row that has ended leaves its batch and a prompt that waits takes its
place, so that one long answer does not make all others wait. The longest prompts go first, so that prompts of like
length, padded on the left, are read together.

Another engine (vLLM beside the training, say) is one more class with the same call; it is imported where it is asked
for, so that nobody has to install it.
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
"""Rows x vocabulary of a batch, at most: drawing takes some twenty bytes of each."""
EVICT_FRACTION = 0.1
"""Share of a batch that must have ended before its rows leave and others join: less often, and places are empty; more
often, and the cache is copied all the time."""
BATCH_TOKENS = {"cpu": 8_192, "cuda": 131_072}
"""Of a batch's cache, by device: rows x (longest prompt + max_new_tokens)."""


@dataclass(frozen=True)
class Response:
    tokens: list[int]
    """With the end token, where it was drawn."""
    log_probs: list[float]
    """Of each token, under the distribution that it was drawn from."""
    ended: bool
    """By an end token; else it was cut off."""


class Engine(Protocol):
    def __call__(self, prompts: Sequence[list[int]], uniform_bt: torch.Tensor, sampling: Sampling) -> list[Response]:
        """An answer to each prompt. uniform_bt: (prompts, max_new_tokens) in [0, 1), float64: what each token of each
        row is drawn by (models/sampling.py). Sampling noise of another kind is allowed where it is seeded by them."""
        ...


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a response of the model. Raises TuneryError where there is none."""
    return stop_token_ids(getattr(model.generation_config, "eos_token_id", None), tokenizer)


def stop_token_ids(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`configured` (of a generation config), those by which the chat template ends a response (`<|im_end|>`, where the
    tokenizer of a Qwen base model has `<|endoftext|>`), and the tokenizer's own. Raises TuneryError where there is
    none."""
    template = chat_template_of(tokenizer).profile.end_tokens if tokenizer.chat_template else ()
    of_template = tokenizer.convert_tokens_to_ids(list(template))
    listed = configured if isinstance(configured, list) else [configured]
    end = sorted({token for token in (tokenizer.eos_token_id, *of_template, *listed) if token is not None})
    if not end:
        raise TuneryError(
            "the model has no end token: an answer would never end",
            cause="neither its chat template, nor its tokenizer, nor its generation config names one",
            remedy="set `eos_token` in its tokenizer_config.json",
        )
    return end


def set_eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the end tokens into the model's generation config: `generate` stops at those alone."""
    model.generation_config.eos_token_id = eos_token_ids(model, tokenizer)


def decode_response(answer: Sequence[int], end: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Without the token that ended it."""
    tokens = answer[:-1] if answer[-1] in end else answer
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TransformersEngine:
    """Batched decoding with a key-value cache, by the model's own forward pass."""

    def __init__(self, model: Any, end: Sequence[int], batch_tokens: int | None = None) -> None:
        """model: a causal language model on its device, or whatever is called like one. end: tokens that end an
        answer. batch_tokens: of a batch's cache."""
        self._model, self._end = model, list(end)
        self._budget = batch_tokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], uniform_bt: torch.Tensor, sampling: Sampling) -> list[Response]:
        if not prompts:
            return []
        device = next(self._model.parameters()).device
        drawing = _SamplerState(len(prompts), uniform_bt.to(device), sampling, self._end)
        waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # the longest is the next
        room = self._rows(len(prompts[waiting[-1]]) + sampling.max_new_tokens, device)
        batch: DecodingBatch | None = None
        while waiting or batch is not None:
            free = room - (0 if batch is None else len(batch.rows_b))
            if waiting and (batch is None or (batch.joinable and free >= EVICT_FRACTION * room)):
                begun = [waiting.pop() for _ in range(min(free, len(waiting)))]
                new = DecodingBatch.of(begun, list(prompts), self._model.config, device)
                drawing.step(new, self._model)
                if batch is None:
                    batch = new
                else:
                    batch.join(new)
            elif batch is not None:
                drawing.step(batch, self._model)
            assert batch is not None
            left = int(batch.alive_b.sum())
            if left == 0:
                batch = None
            elif left <= (1 - EVICT_FRACTION) * len(batch.rows_b):
                batch.leave()
        return list(drawing.answers())

    def _rows(self, width: int, device: torch.device) -> int:
        """That share a batch, none of them with more than `width` tokens."""
        budget = self._budget or BATCH_TOKENS[device.type]
        most: int = MAX_LOGITS // self._model.config.get_text_config().vocab_size
        return max(1, min(most, budget // width))


class _SamplerState:
    """The tokens of all answers, as they are drawn."""

    def __init__(self, rows: int, uniform_bt: torch.Tensor, sampling: Sampling, end: list[int]) -> None:
        """uniform_bt: (rows, max_new_tokens), on the model's device."""
        self._uniform_bt, self._sampling, self._end = uniform_bt, sampling, end
        self._end_e = torch.tensor(end, device=uniform_bt.device)
        self._tokens_bt = torch.full((rows, sampling.max_new_tokens), -1, device=uniform_bt.device)
        self._log_probs_bt = torch.zeros(rows, sampling.max_new_tokens, device=uniform_bt.device)

    def step(self, batch: DecodingBatch, model: Any) -> None:
        """One token more for each row of a batch. What a row draws that has ended and not left yet is thrown away."""
        most = self._sampling.max_new_tokens
        logits_bv = batch.forward(model).float()
        if self._end and self._sampling.min_new_tokens:
            early_b1 = (batch.times_b < self._sampling.min_new_tokens)[:, None]
            logits_bv[:, self._end_e] = logits_bv[:, self._end_e].masked_fill(early_b1, -torch.inf)
        place = (batch.rows_b, batch.times_b.clamp(max=most - 1))
        drawn_b, log_prob_b = sample(logits_bv, self._uniform_bt[place], self._sampling)
        self._tokens_bt[place] = torch.where(batch.alive_b, drawn_b, self._tokens_bt[place])
        self._log_probs_bt[place] = torch.where(batch.alive_b, log_prob_b, self._log_probs_bt[place])
        batch.append(drawn_b, torch.isin(drawn_b, self._end_e) | (batch.times_b + 1 >= most))

    def answers(self) -> Iterator[Response]:
        for row, values in zip(self._tokens_bt.tolist(), self._log_probs_bt.tolist(), strict=True):
            length = row.index(-1) if -1 in row else len(row)
            yield Response(row[:length], values[:length], row[length - 1] in self._end)

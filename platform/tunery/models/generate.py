"""Answers of a model to prompts: what an engine for it must do, and the one that ships, on transformers' forward pass.

Prompts of like length share a batch, padded on the left. A row that has ended leaves: when a quarter of a batch has,
the others go on in a smaller one, so that one long answer does not make all others wait in full width.

Another engine (vLLM beside the training, say) is one more class with the same call; it is imported where it is asked
for, so that nobody has to install it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tunery.errors import TuneryError
from tunery.models.sampling import draw
from tunery.spec import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_LOGITS = 1 << 28
"""Rows x vocabulary of a batch, at most: drawing takes some twenty bytes of each."""
LEAVING = 0.25
"""Share of a batch that must have ended before it is made smaller: less often, and rows wait; more often, and the
cache is copied all the time."""
BATCH_TOKENS = {"cpu": 8_192, "cuda": 131_072}
"""Of a batch's cache, by device: rows x (longest prompt + max_new_tokens)."""


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    """With the end token, where it was drawn."""
    log_probs: list[float]
    """Of each token, under the distribution that it was drawn from."""
    ended: bool
    """By an end token; else it was cut off."""


class Engine(Protocol):
    def __call__(self, prompts: Sequence[list[int]], uniform_bt: torch.Tensor, sampling: Sampling) -> list[Answer]:
        """An answer to each prompt. uniform_bt: (prompts, max_new_tokens) in [0, 1), float64: what each token of each
        row is drawn by (models/sampling.py). Sampling noise of another kind is allowed where it is seeded by them."""
        ...


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end an answer: the tokenizer's, and those of the model's generation config.

    Raises TuneryError where there is none.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    end = sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None})
    if not end:
        raise TuneryError(
            "the model has no end token: an answer would never end",
            cause="neither its tokenizer nor its generation config names one",
            remedy="set `eos_token` in its tokenizer_config.json",
        )
    return end


def text_of(answer: Sequence[int], end: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Without the token that ended it."""
    tokens = answer[:-1] if answer[-1] in end else answer
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TransformersEngine:
    """Batched decoding with a key-value cache, by the model's own forward pass."""

    def __init__(self, model: Any, end: Sequence[int], batch_tokens: int | None = None) -> None:
        """model: a causal language model on its device, or whatever is called like one. end: tokens that end an
        answer."""
        self._model, self._end = model, list(end)
        self._budget = batch_tokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], uniform_bt: torch.Tensor, sampling: Sampling) -> list[Answer]:
        device = next(self._model.parameters()).device
        budget = self._budget or BATCH_TOKENS[device.type]
        most = max(1, MOST_LOGITS // self._model.config.get_text_config().vocab_size)
        answers: dict[int, Answer] = {}
        for batch in batches_by_length([len(prompt) for prompt in prompts], sampling.max_new_tokens, budget, most):
            drawn = self._batch([prompts[index] for index in batch], uniform_bt[batch].to(device), sampling, device)
            answers |= zip(batch, drawn, strict=True)
        return [answers[index] for index in range(len(prompts))]

    def _batch(
        self, prompts: list[list[int]], uniform_bt: torch.Tensor, sampling: Sampling, device: torch.device
    ) -> list[Answer]:
        from transformers import DynamicCache

        longest = max(map(len, prompts))
        gaps = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)], device=device)
        # Rows are never longer than this: the mask is made once, and a step shows one column more of it.
        mask = torch.ones(len(prompts), longest + sampling.max_new_tokens, dtype=torch.int64, device=device)
        for row, gap in enumerate(gaps):
            mask[row, :gap] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        end = torch.tensor(self._end, device=device)
        rows = torch.arange(len(prompts), device=device)
        tokens = torch.full((len(prompts), sampling.max_new_tokens), -1, device=device)
        log_probs = torch.zeros(len(prompts), sampling.max_new_tokens, device=device)
        alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        seen = 0
        for time in range(sampling.max_new_tokens):
            width = longest + time
            logits_b1v = self._model(
                input_ids=ids,
                attention_mask=mask[rows, :width],
                position_ids=positions[rows, seen:width],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            seen = width
            forbidden = self._end if time < sampling.min_new_tokens else ()
            drawn, log_prob = draw(logits_b1v[:, -1], uniform_bt[rows, time], sampling, forbidden)
            # A row that has ended stays in the batch until it is made smaller: what it draws is thrown away.
            here = rows[alive]
            tokens[here, time], log_probs[here, time] = drawn[alive], log_prob[alive]
            alive &= ~torch.isin(drawn, end)
            ids = drawn[:, None]
            left = int(alive.sum())
            if left == 0:
                break
            if left <= (1 - LEAVING) * len(rows):
                staying = alive.nonzero()[:, 0]
                cache.batch_select_indices(staying)
                rows, ids, alive = rows[staying], ids[staying], alive[staying]
        return list(_answers(tokens, log_probs, set(self._end)))


def _answers(tokens: torch.Tensor, log_probs: torch.Tensor, end: set[int]) -> Iterator[Answer]:
    """From (rows, max_new_tokens), -1 behind the end of a row."""
    for row, values in zip(tokens.tolist(), log_probs.tolist(), strict=True):
        length = row.index(-1) if -1 in row else len(row)
        yield Answer(row[:length], values[:length], row[length - 1] in end)


def batches_by_length(lengths: Sequence[int], new_tokens: int, budget: int, most: int = 1 << 30) -> list[list[int]]:
    """Indices of prompts, longest first, so many a batch that its cache holds at most `budget` tokens, at least one,
    and `most` at the most."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    while order:
        rows = min(most, max(1, budget // (lengths[order[0]] + new_tokens)))
        batches.append(order[:rows])
        order = order[rows:]
    return batches

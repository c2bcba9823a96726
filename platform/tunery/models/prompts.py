"""Prompts as tokens, for whoever lets a model answer them: PPO, and comparisons of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunery.errors import StageError
from tunery.models.encode import as_prompt, encode_prompts
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ["id", "text", "messages", "tools"]


@dataclass
class Prompts:
    rows: list[Row] = field(default_factory=list)
    """Each a conversation that ends with a question."""
    tokens: list[list[int]] = field(default_factory=list)
    read: int = 0
    too_long: int = 0
    """Prompts that leave no room for an answer: left out."""
    unusable: int = 0
    """Rows in which nothing is asked, and those that the chat template can't render."""
    rejected: str = ""
    """Why the chat template can't render the first of those."""

    @property
    def left_out(self) -> Counter[str]:
        """Rows that are not answered, by reason."""
        asks_nothing = "nothing is asked, or the chat template can't render it"
        reasons = {"the prompt leaves no room for a response": self.too_long, asks_nothing: self.unusable}
        return Counter({reason: count for reason, count in reasons.items() if count})


def read_prompts(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, longest: int, stage: str, named: str
) -> Prompts:
    """`longest`: tokens of a prompt, at most. Raises StageError when none is left."""
    found = take_prompts(rows, tokenizer, longest)
    if not found.tokens:
        raise none_to_answer(stage, named, found.read, found.too_long, found.unusable, longest, found.rejected)
    return found


def take_prompts(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, longest: int) -> Prompts:
    """The same, where none need be left."""
    found = Prompts()
    pending: list[Row] = []

    def take() -> None:
        for row, prompt in zip(pending, encode_prompts(pending, tokenizer), strict=True):
            if prompt.rejected:
                found.unusable += 1
                found.rejected = found.rejected or prompt.rejected
            elif len(prompt.ids) > longest:
                found.too_long += 1
            else:
                found.rows.append(row)
                found.tokens.append(prompt.ids)
        pending.clear()

    for row in rows:
        found.read += 1
        try:
            pending.append(as_prompt(row))
        except ValueError:
            found.unusable += 1
        if len(pending) == 1000:
            take()
    take()
    return found


def none_to_answer(
    stage: str, named: str, read: int, too_long: int, unusable: int, longest: int, rejected: str = ""
) -> StageError:
    """The error for rows of which none is left."""
    return StageError(
        stage,
        f"none of the {read:,} rows of `{named}` can be answered",
        cause=f"{too_long:,} prompts are longer than {longest:,} tokens, {unusable:,} rows ask nothing"
        + (f" or can't be rendered ({rejected})" if rejected else ""),
        remedy="raise `max_length`, lower `sampling.max_new_tokens` (a prompt may be as long as the one less the "
        "other), or give other rows",
    )

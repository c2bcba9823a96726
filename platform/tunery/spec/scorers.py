"""What rows can be scored by. A scorer is a mapping whose first key names it: `{perplexity: base}`.

A new scorer: its class here and in `Scorer`, its file in data/scorers/, and its line in data/scorers/table.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tunery.spec.reference import Input, Model, Pretrained, Spec, model_inputs


class ScorerSpec(Spec):
    """The first field of a scorer is its kind."""

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")] | None = None
    """What the score is called, where a stage has two of a kind; else its kind."""

    @classmethod
    def kind(cls) -> str:
        return next((field for field in cls.model_fields if field != "name"), "")

    @property
    def score(self) -> str:
        """The name of the score: the column in the table, and the key in `keep`."""
        return self.name or self.kind()

    @property
    def model(self) -> str | Pretrained | None:
        """Of scorers that need one."""
        return None

    def inputs(self) -> Iterator[Input]:
        """Stages that the scorer reads, by path within it."""
        if self.model is not None:
            yield from model_inputs((self.kind(),), self.model)


class Perplexity(ScorerSpec):
    """exp of the mean negative log-likelihood of a row's tokens. Lower is better.

    Marion et al. 2023, "When Less is More" (https://arxiv.org/abs/2309.04564).
    """

    perplexity: Model
    of: Literal["answer", "whole"] = "answer"
    """answer: of the last answer given all before it (of a text, the whole); whole: of every token."""

    @property
    def model(self) -> str | Pretrained:
        return self.perplexity


class Ifd(ScorerSpec):
    """Instruction-following difficulty: perplexity of the answer given the question over that of the answer alone.

    Near 1 (and above) the question does not help, so the two hardly belong together; near 0 the answer is trivial.
    Li et al. 2024, "From Quantity to Quality" (https://arxiv.org/abs/2308.12032), who take the highest below 1 for
    training. As a filter of damaged rows, lower is better.
    """

    ifd: Model

    @property
    def model(self) -> str | Pretrained:
        return self.ifd


SCORERS: tuple[type[ScorerSpec], ...] = (Perplexity, Ifd)


def _scorer_tag(value: Any) -> str:
    """Which scorer is meant, so that an error speaks of that one."""
    if isinstance(value, ScorerSpec):
        return value.kind()
    if isinstance(value, dict) and value:
        kinds = [scorer.kind() for scorer in SCORERS]
        for key in value:
            if near := difflib.get_close_matches(str(key), kinds, n=1):
                return near[0]
        return str(next(iter(value)))
    return "no scorer"


Scorer = Annotated[
    Annotated[Perplexity, Tag("perplexity")] | Annotated[Ifd, Tag("ifd")],
    Discriminator(_scorer_tag),
]

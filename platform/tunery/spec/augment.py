"""The stage kind `augment`: what its templates, examples and chains of thought may be."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from tunery.spec.references import ROWS, Config, Gives, StageRef

PLAIN = "{question}"
"""The template that changes nothing."""


def _fields(text: str) -> list[str]:
    """The names in braces, in their order. Raises ValueError where a brace is open, or holds more than a name."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{str(error).lower()}; a literal brace is written twice, {{{{ or }}}}") from None
    for _, name, layout, conversion in pieces:
        if layout or conversion:
            raise ValueError(f"`{name}` stands with a format, and only the name may stand in the braces")
    return [name for _, name, _, _ in pieces if name is not None]


def _with(*known: str) -> AfterValidator:
    """A text with each of these names in braces, the last one once and behind the others, and no others."""

    def check(text: str) -> str:
        found = _fields(text)
        if unknown := sorted(set(found) - set(known)):
            raise ValueError(
                f"it names {', '.join(f'{{{name}}}' for name in unknown)}, "
                f"and there is only {' and '.join(f'{{{name}}}' for name in known)}; a literal brace is written twice"
            )
        if missing := [name for name in known if name not in found]:
            raise ValueError(f"it lacks {' and '.join(f'{{{name}}}' for name in missing)}")
        if len(known) > 1 and (found[-1] != known[-1] or found.count(known[-1]) > 1):
            raise ValueError(f"{{{known[-1]}}} should stand in it once, behind {{{known[0]}}}")
        return text

    return AfterValidator(check)


class FewShot(Config):
    """Examples before the question (Brown et al. 2020, https://arxiv.org/abs/2005.14165)."""

    shots: (
        Annotated[int, Field(ge=0), Tag("number")]
        | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2, max_length=2), Tag("range")]
    ) = Field(discriminator=Discriminator(lambda value: "range" if isinstance(value, list | tuple) else "number"))
    """Number of examples, or a range [LOW, HIGH] from which each variant samples one, ends included. A range from 0
    mixes zero-shot with few-shot prompts, which helps both (Longpre et al. 2023)."""
    examples: str | None = None
    """Stage with the examples; `data` when not given."""
    layout: Literal["turns", "prompt"] = "turns"
    """turns: examples are messages before the question. prompt: they are text in the question's message."""
    example: Annotated[str, _with("question", "answer")] = "Q: {question}\nA: {answer}"
    """Format of an example in `layout: prompt`; the question itself follows in the same format, up to its answer. With
    templates that introduce the answer themselves use `"{question}\\n{answer}"`."""
    max_chars: Annotated[int, Field(ge=1)] = 1600
    """Maximum number of characters of the row including examples and response; examples that do not fit are left out.
    The default `max_length` of 512 tokens is about 1,700 characters."""

    @field_validator("shots")
    @classmethod
    def _ascending(cls, shots: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(shots, tuple) and shots[0] > shots[1]:
            raise ValueError(f"the range ends ({shots[1]}) before it begins ({shots[0]})")
        return shots

    @property
    def counts(self) -> range:
        """The numbers of examples that may be drawn."""
        low, high = (self.shots, self.shots) if isinstance(self.shots, int) else self.shots
        return range(low, high + 1)


class ChainOfThought(Config):
    """For responses with reasoning and, after a separator, the final answer (Wei et al. 2022,
    https://arxiv.org/abs/2201.11903), such as GSM8K's `... #### 42`."""

    separator: Annotated[str, Field(min_length=1)]
    """Text between reasoning and final answer; its last occurrence counts."""
    cue: Annotated[str, Field(min_length=1)] = "Let's think step by step."
    """Line below a question whose response contains the reasoning (Kojima et al. 2022,
    https://arxiv.org/abs/2205.11916)."""
    direct: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the variants without cue and reasoning, whose response is the final answer only."""


class Augment(Config):
    """Builds prompts from the rows with templates, few-shot examples and chain of thought, as in FLAN (Wei et al. 2021,
    https://arxiv.org/abs/2109.01652) and the Flan Collection (Longpre et al. 2023,
    https://arxiv.org/abs/2301.13688)."""

    kind: Literal["augment"]
    gives: ClassVar[Gives] = "rows"
    data: str
    """Conversations, prompts, preference pairs or rated responses."""
    templates: Annotated[tuple[Annotated[str, _with("question")], ...], Field(min_length=1)] = (PLAIN,)
    """Templates of the last user message, with the placeholder {question}. The variants of a row use them in turn, in
    an order sampled per row."""
    few_shot: FewShot | None = None
    """Adds examples."""
    chain_of_thought: ChainOfThought | None = None
    """Requests reasoning."""
    copies: Annotated[int, Field(ge=1)] = 1
    """Number of variants of a row."""
    originals: bool = False
    """Whether the output also contains the original rows, each before its variants."""
    heldout: tuple[str, ...] = ()
    """Evaluation stages: their rows, and rows of the same groups, are not used as examples and not output."""
    seed: int | None = None
    """Seed of the sampling; the experiment's when not given."""

    def inputs(self) -> Iterator[StageRef]:
        yield StageRef(("data",), self.data, ROWS)
        if self.few_shot is not None and self.few_shot.examples is not None:
            yield StageRef(("few_shot", "examples"), self.few_shot.examples, ROWS)
        for index, stage in enumerate(self.heldout):
            yield StageRef(("heldout", index), stage, ROWS)

    @field_validator("templates", "heldout")
    @classmethod
    def _distinct(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({item for item in given if given.count(item) > 1}):
            raise ValueError(f"{', '.join(map(repr, twice))} stands in it twice")
        return given

    @model_validator(mode="after")
    def _different_prompts(self) -> Augment:
        if self.templates == (PLAIN,) and self.few_shot is None and self.chain_of_thought is None:
            raise ValueError("it changes nothing: give `templates`, `few_shot` or `chain_of_thought`")
        if self.few_shot is None or self.few_shot.counts == range(1):
            direct = self.chain_of_thought.direct if self.chain_of_thought else 0.0
            most = max(math.ceil(self.copies * direct), math.ceil(self.copies * (1 - direct)))
            if most > len(self.templates):
                raise ValueError(
                    f"{self.copies} copies can't all differ by {len(self.templates)} of `templates` and no examples: "
                    "give more templates, `few_shot`, or fewer copies"
                )
        return self

"""Config of the stage kind `augment`: templates, few-shot examples and chain of thought."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from tunery.spec.references import ROWS, Config, OutputType, StageRef
from tunery.spec.stage_config import StageConfig

PLAIN = "{question}"
"""The identity template."""


def _fields(text: str) -> list[str]:
    """Return the placeholder names in order. Raises ValueError for an unclosed brace or a format specification."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{str(error).lower()}; write a literal brace twice: {{{{ or }}}}") from None
    for _, name, layout, conversion in pieces:
        if layout or conversion:
            raise ValueError(f"`{name}` has a format specification; a placeholder has only a name")
    return [name for _, name, _, _ in pieces if name is not None]


def _with(*known: str) -> AfterValidator:
    """Validate a template: it has all `known` placeholders and no others, and the last one once, after the others."""

    def check(text: str) -> str:
        names = _fields(text)
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(
                f"unknown placeholder {', '.join(f'{{{name}}}' for name in unknown)}; "
                f"known: {', '.join(f'{{{name}}}' for name in known)}. Write a literal brace twice"
            )
        if missing := [name for name in known if name not in names]:
            raise ValueError(f"missing placeholder {' and '.join(f'{{{name}}}' for name in missing)}")
        if len(known) > 1 and (names[-1] != known[-1] or names.count(known[-1]) > 1):
            raise ValueError(f"{{{known[-1]}}} must occur once, after {{{known[0]}}}")
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
            raise ValueError(f"the lower bound {shots[0]} is above the upper bound {shots[1]}")
        return shots

    @property
    def counts(self) -> range:
        """The possible numbers of examples."""
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


class Augment(StageConfig):
    """Builds prompts from the rows with templates, few-shot examples and chain of thought, as in FLAN (Wei et al. 2021,
    https://arxiv.org/abs/2109.01652) and the Flan Collection (Longpre et al. 2023,
    https://arxiv.org/abs/2301.13688)."""

    kind: Literal["augment"]
    output_type: ClassVar[OutputType] = "rows"
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
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the sampling; the experiment's when not given."""

    def inputs(self) -> Iterator[StageRef]:
        yield StageRef(("data",), self.data, ROWS)
        if self.few_shot is not None and self.few_shot.examples is not None:
            yield StageRef(("few_shot", "examples"), self.few_shot.examples, ROWS)
        for index, stage in enumerate(self.heldout):
            yield StageRef(("heldout", index), stage, ROWS)

    @property
    def uses_seed(self) -> bool:
        return True

    def estimate_rows(self, rows: int) -> int:
        return rows * (self.copies + self.originals)

    @field_validator("templates", "heldout")
    @classmethod
    def _distinct(cls, items: tuple[str, ...]) -> tuple[str, ...]:
        if repeated := sorted({item for item in items if items.count(item) > 1}):
            raise ValueError(f"{', '.join(map(repr, repeated))} occurs more than once")
        return items

    @model_validator(mode="after")
    def _different_prompts(self) -> Augment:
        if self.templates == (PLAIN,) and self.few_shot is None and self.chain_of_thought is None:
            raise ValueError("it has no effect: set `templates`, `few_shot` or `chain_of_thought`")
        if self.few_shot is None or self.few_shot.counts == range(1):
            direct = self.chain_of_thought.direct if self.chain_of_thought else 0.0
            max_copies = max(math.ceil(self.copies * direct), math.ceil(self.copies * (1 - direct)))
            if max_copies > len(self.templates):
                raise ValueError(
                    f"{self.copies} copies can't all differ with {len(self.templates)} templates and without examples: "
                    "add templates or `few_shot`, or reduce `copies`"
                )
        return self

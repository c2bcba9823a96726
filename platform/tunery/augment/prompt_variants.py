"""The variants of one row: its last question worded by a template, after examples, with or without its reasoning.

The row's group, source, line, planted damage, label and rejected answer stay as they are, so that splits, quotas and
judges see the row that it comes from; its id is that of the new content. What is drawn depends on seed, row id and the
variant's number alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from tunery.augment.few_shot_pool import FewShotPool
from tunery.augment.hash_stream import hash_stream, shuffled, spread_evenly
from tunery.augment.heldout_rows import group_number
from tunery.augment.qa_pairs import QAPair, final_answer, last_user_index, multi_turn_reason, system_of
from tunery.spec import Augment, ChainOfThought, FewShot
from tunery.store.rows import Row, Turn, row_id

Form = Literal["reasoned", "direct", "whole"]
"""reasoned: with the cue, answered with the reasoning. direct: without, answered by the final answer alone. whole:
without, answered as it was: no chain of thought was asked for, or the answer holds none."""


@dataclass(frozen=True)
class Variant:
    row: Row
    template: int
    """Index of the one that words its question."""
    form: Form
    shots: int
    """Examples that it has."""
    fewer: str
    """Why they are fewer than were drawn, or none could be; "" where they aren't."""


def variants(row: Row, stage: Augment, pool: FewShotPool, seed: int) -> list[Variant] | str:
    """`stage.copies` variants, or why the row has none. Some of them may be the same (see `distinct`)."""
    at = last_user_index(row)
    if at is None:
        return "no question"
    few_shot, without = stage.few_shot, ""
    if few_shot is not None and few_shot.counts[-1] and (without := multi_turn_reason(row) or ""):
        few_shot = None
    made = []
    for copy, (form, template, shots) in enumerate(_plans(row, stage, few_shot, seed)):
        builder = _Builder(row, at, stage.templates[template], form, stage.chain_of_thought)
        examples: list[QAPair] = []
        if shots and few_shot is not None:
            examples = _examples(builder, few_shot, pool, shots, hash_stream(seed, row["id"], copy))
        fewer = without or ("no other example fits" if len(examples) < shots else "")
        made.append(Variant(builder.built(examples, few_shot), template, form, len(examples), fewer))
    return made


def distinct(row: Row, made: Sequence[Variant], with_row: bool) -> list[Variant]:
    """Those that differ from the ones before them and, `with_row`, from the row itself."""
    seen = {row["id"]} if with_row else set()
    kept = []
    for variant in made:
        if variant.row["id"] not in seen:
            seen.add(variant.row["id"])
            kept.append(variant)
    return kept


def _plans(row: Row, stage: Augment, few_shot: FewShot | None, seed: int) -> Iterator[tuple[Form, int, int]]:
    """Form, template and number of examples of each copy."""
    forms = _forms(row, stage, hash_stream(seed, row["id"]))
    counts = few_shot.counts if few_shot is not None else range(1)
    pairs = {form: _pairs(len(stage.templates), counts, seed, row["id"], form) for form in forms}
    for form in forms:
        yield form, *next(pairs[form])


def _pairs(templates: int, counts: range, *key: object) -> Iterator[tuple[int, int]]:
    """Template and number of examples, without end: the templates in turn, in an order drawn by the key, each with
    the numbers of examples in an order of its own."""
    order = list(shuffled(templates, hash_stream(*key)))
    shots = {template: [counts[at] for at in shuffled(len(counts), hash_stream(*key, template))] for template in order}
    for lap in itertools.count():
        for template in order:
            yield template, shots[template][lap % len(counts)]


def _forms(row: Row, stage: Augment, drawn: Iterator[int]) -> list[Form]:
    """Answers that were rated or preferred were judged as a whole, and stay whole."""
    thought = stage.chain_of_thought
    answer = row["messages"][-1]
    if thought is None:
        return ["whole"] * stage.copies
    if answer["role"] == "assistant":
        if final_answer(answer["content"], thought.separator) is None:
            return ["whole"] * stage.copies
        if row.get("label") is not None or row.get("rejected"):
            return ["reasoned"] * stage.copies
    return ["direct" if direct else "reasoned" for direct in spread_evenly(thought.direct, stage.copies, drawn)]


def _examples(
    builder: _Builder, few_shot: FewShot, pool: FewShotPool, shots: int, drawn: Iterator[int]
) -> list[QAPair]:
    row = builder.row
    # What stands around an example, and around the question behind them, is shorter than the text that says it.
    around = len(few_shot.example) if few_shot.layout == "prompt" else 0
    left = few_shot.max_chars - _length(builder.messages([], few_shot)) - around

    def fits(example: QAPair) -> bool:
        nonlocal left
        size = sum(map(len, builder.shown(example))) + around
        if size > left:
            return False
        left -= size
        return True

    kind = (system_of(row), builder.form != "whole")
    return pool.draw(kind, shots, (row["id"], group_number(row.get("group"))), fits, drawn)


@dataclass(frozen=True)
class _Builder:
    row: Row
    at: int
    template: str
    form: Form
    thought: ChainOfThought | None

    def worded(self, question: str) -> str:
        """By the template; `format` puts the question in as it is, whatever braces it holds."""
        asked = self.template.format(question=question)
        return f"{asked}\n{self.thought.cue}" if self.form == "reasoned" and self.thought else asked

    def shown(self, example: QAPair) -> tuple[str, str]:
        """Question and answer of an example in this variant's own template and form."""
        answer = example.final if self.form == "direct" and example.final is not None else example.answer
        return self.worded(example.question), answer

    def built(self, examples: Sequence[QAPair], few_shot: FewShot | None) -> Row:
        new = {**self.row, "messages": self.messages(examples, few_shot)}
        return {**new, "id": row_id(new)}

    def messages(self, examples: Sequence[QAPair], few_shot: FewShot | None) -> list[Turn]:
        turns = self.row["messages"]
        before, asked, after = turns[: self.at], turns[self.at], turns[self.at + 1 :]
        question = self.worded(asked["content"])
        shots: list[Turn] = []
        if examples and few_shot is not None:
            shown = [self.shown(example) for example in examples]
            if few_shot.layout == "turns":
                shots = [turn for q, a in shown for turn in (_turn("user", q), _turn("assistant", a))]
            else:
                texts = [few_shot.example.format(question=q, answer=a) for q, a in shown]
                question = "\n\n".join([*texts, _opening(few_shot.example, question)])
        return [*before, *shots, {**asked, "content": question}, *self._answered(after)]

    def _answered(self, after: Sequence[Turn]) -> list[Turn]:
        if self.form != "direct" or self.thought is None or not after:
            return list(after)
        final = final_answer(after[-1]["content"], self.thought.separator)
        assert final is not None, "_forms saw to it"
        return [*after[:-1], {**after[-1], "content": final}]


def _opening(example: str, question: str) -> str:
    """An example's text up to where its answer would begin."""
    text = ""
    for literal, name, _, _ in Formatter().parse(example):
        text += literal
        if name == "answer":
            break
        text += question if name else ""
    return text.rstrip()


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _length(turns: Sequence[Turn]) -> int:
    """Characters of all turns."""
    return sum(len(turn["content"]) for turn in turns)

"""Builds the variants of a row: its last question rendered with a template, few-shot examples before it, and its answer
with or without reasoning.

A variant keeps the row's group, source, line, injected corruption, label and rejected response, so that splits, quotas
and evaluations relate it to the original row; its id is that of the new content. All random choices depend only on the
seed, the row id and the number of the variant.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from tunery.augment.few_shot_pool import FewShotPool
from tunery.augment.hash_stream import hash_stream, shuffled, spread_evenly
from tunery.augment.heldout_rows import group_hash
from tunery.augment.qa_pairs import QAPair, final_answer, last_user_index, multi_turn_reason, system_of
from tunery.spec import Augment, ChainOfThought, FewShot
from tunery.store.rows import Message, Row, row_id

Form = Literal["reasoned", "direct", "whole"]
"""reasoned: prompt with the cue, answer with its reasoning. direct: prompt without the cue, final answer only. whole:
prompt without the cue, original answer, because no chain of thought is requested or the answer contains none."""


@dataclass(frozen=True)
class Variant:
    row: Row
    template: int
    """Index of the template."""
    form: Form
    shots: int
    """Number of examples."""
    fewer: str
    """Reason why it has fewer examples than requested, or ""."""


def variants(row: Row, stage: Augment, pool: FewShotPool, seed: int) -> list[Variant] | str:
    """Return `stage.copies` variants, or the reason why the row has none. Variants may be equal (see `distinct`)."""
    user_index = last_user_index(row)
    if user_index is None:
        return "no question"
    few_shot, no_examples_reason = stage.few_shot, ""
    if few_shot is not None and few_shot.counts[-1] and (no_examples_reason := multi_turn_reason(row) or ""):
        few_shot = None
    built = []
    for copy, (form, template, shots) in enumerate(_plan_copies(row, stage, few_shot, seed)):
        builder = _VariantBuilder(row, user_index, stage.templates[template], form, stage.chain_of_thought)
        examples: list[QAPair] = []
        if shots and few_shot is not None:
            examples = _sample_examples(builder, few_shot, pool, shots, hash_stream(seed, row["id"], copy))
        fewer = no_examples_reason or ("no other example fits" if len(examples) < shots else "")
        built.append(Variant(builder.build(examples, few_shot), template, form, len(examples), fewer))
    return built


def distinct(row: Row, row_variants: Sequence[Variant], with_row: bool) -> list[Variant]:
    """Return the variants that differ from all earlier ones and, if `with_row`, from the row itself."""
    ids = {row["id"]} if with_row else set()
    kept = []
    for variant in row_variants:
        if variant.row["id"] not in ids:
            ids.add(variant.row["id"])
            kept.append(variant)
    return kept


def _plan_copies(row: Row, stage: Augment, few_shot: FewShot | None, seed: int) -> Iterator[tuple[Form, int, int]]:
    """Yield the form, template and number of examples of each copy."""
    forms = _response_forms(row, stage, hash_stream(seed, row["id"]))
    counts = few_shot.counts if few_shot is not None else range(1)
    plans = {form: _template_shots(len(stage.templates), counts, seed, row["id"], form) for form in forms}
    for form in forms:
        yield form, *next(plans[form])


def _template_shots(num_templates: int, counts: range, *key: object) -> Iterator[tuple[int, int]]:
    """Yield an endless sequence of (template, number of examples): templates cycle in a random order, and each template
    cycles through the numbers of examples in a random order of its own."""
    order = list(shuffled(num_templates, hash_stream(*key)))
    shots = {
        template: [counts[index] for index in shuffled(len(counts), hash_stream(*key, template))] for template in order
    }
    for cycle in itertools.count():
        for template in order:
            yield template, shots[template][cycle % len(counts)]


def _response_forms(row: Row, stage: Augment, random_numbers: Iterator[int]) -> list[Form]:
    """Return the form of each copy. A labelled or preferred answer keeps its reasoning, because it was judged with
    it."""
    chain_of_thought = stage.chain_of_thought
    answer = row["messages"][-1]
    if chain_of_thought is None:
        return ["whole"] * stage.copies
    if answer["role"] == "assistant":
        if final_answer(answer["content"], chain_of_thought.separator) is None:
            return ["whole"] * stage.copies
        if row.get("label") is not None or row.get("rejected"):
            return ["reasoned"] * stage.copies
    is_direct = spread_evenly(chain_of_thought.direct, stage.copies, random_numbers)
    return ["direct" if direct else "reasoned" for direct in is_direct]


def _sample_examples(
    builder: _VariantBuilder, few_shot: FewShot, pool: FewShotPool, shots: int, random_numbers: Iterator[int]
) -> list[QAPair]:
    row = builder.row
    # An upper bound: the text around an example, or around the question, is shorter than the example format.
    overhead = len(few_shot.example) if few_shot.layout == "prompt" else 0
    remaining = few_shot.max_chars - _num_chars(builder.messages([], few_shot)) - overhead

    def fits(example: QAPair) -> bool:
        nonlocal remaining
        size = sum(map(len, builder.render_example(example))) + overhead
        if size > remaining:
            return False
        remaining -= size
        return True

    kind = (system_of(row), builder.form != "whole")
    return pool.sample(kind, shots, (row["id"], group_hash(row.get("group"))), fits, random_numbers)


@dataclass(frozen=True)
class _VariantBuilder:
    row: Row
    user_index: int
    """Index of the last user message."""
    template: str
    form: Form
    chain_of_thought: ChainOfThought | None

    def render_question(self, question: str) -> str:
        """Render a question with the template; `format` does not interpret braces in the question."""
        rendered = self.template.format(question=question)
        if self.form == "reasoned" and self.chain_of_thought:
            return f"{rendered}\n{self.chain_of_thought.cue}"
        return rendered

    def render_example(self, example: QAPair) -> tuple[str, str]:
        """Return question and answer of an example in the template and form of this variant."""
        answer = example.final if self.form == "direct" and example.final is not None else example.answer
        return self.render_question(example.question), answer

    def build(self, examples: Sequence[QAPair], few_shot: FewShot | None) -> Row:
        new = {**self.row, "messages": self.messages(examples, few_shot)}
        return {**new, "id": row_id(new)}

    def messages(self, examples: Sequence[QAPair], few_shot: FewShot | None) -> list[Message]:
        messages = self.row["messages"]
        before, user_message, after = (
            messages[: self.user_index],
            messages[self.user_index],
            messages[self.user_index + 1 :],
        )
        question = self.render_question(user_message["content"])
        shots: list[Message] = []
        if examples and few_shot is not None:
            rendered = [self.render_example(example) for example in examples]
            if few_shot.layout == "turns":
                shots = [message for q, a in rendered for message in (_message("user", q), _message("assistant", a))]
            else:
                texts = [few_shot.example.format(question=q, answer=a) for q, a in rendered]
                question = "\n\n".join([*texts, _render_unanswered(few_shot.example, question)])
        return [*before, *shots, {**user_message, "content": question}, *self._response(after)]

    def _response(self, after: Sequence[Message]) -> list[Message]:
        """Return the messages after the question, with only the final answer in the form `direct`."""
        if self.form != "direct" or self.chain_of_thought is None or not after:
            return list(after)
        final = final_answer(after[-1]["content"], self.chain_of_thought.separator)
        assert final is not None, "_response_forms gives the form `direct` only to answers with reasoning"
        return [*after[:-1], {**after[-1], "content": final}]


def _render_unanswered(example: str, question: str) -> str:
    """Return the example format with `question`, up to the position of the answer."""
    text = ""
    for literal, name, _, _ in Formatter().parse(example):
        text += literal
        if name == "answer":
            break
        text += question if name else ""
    return text.rstrip()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _num_chars(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)

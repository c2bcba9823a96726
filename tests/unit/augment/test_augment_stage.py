"""Variants of rows against hand-written ones, and their properties: held-out rows are excluded, no row is lost, and the
same seed gives identical files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import stage_context

from tunery.augment import augment_stage as stage_module
from tunery.augment import few_shot_pool as pool_module
from tunery.augment.augment_stage import run_augment
from tunery.augment.few_shot_pool import FewShotPool, read_pool
from tunery.augment.hash_stream import hash_stream, shuffled, spread_evenly
from tunery.augment.heldout_rows import Heldout
from tunery.augment.prompt_variants import variants
from tunery.augment.qa_pairs import qa_pair_of
from tunery.errors import RowCountError, StageError
from tunery.spec import Augment
from tunery.store import Artifact, StageResult
from tunery.store.rows import Row, read_rows, row_format, row_id, write_rows

COT = {"separator": "####", "cue": "Think!"}


def conversation(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """Return alternating messages of user and assistant, after a system message if there is one."""
    actual = [{"role": "system", "content": system}] if system else []
    return actual + [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant") * len(contents), contents, strict=False)
    ]


def row(*contents: str, group: str | None = "", **fields: Any) -> Row:
    """Return a row with a conversation; its group defaults to the first question."""
    result: Row = {
        "messages": conversation(*contents),
        "source": "a.jsonl",
        "line": 1,
        "injected_corruption": "",
        **fields,
    }
    result["group"] = contents[0] if group == "" else group
    return {**result, "id": row_id(result)}


def augment(**fields: Any) -> Augment:
    return Augment.model_validate_json(json.dumps({"kind": "augment", "data": "rows", **fields}), strict=True)


def pool_of(rows: Sequence[Row], separator: str | None = None) -> FewShotPool:
    pool = FewShotPool()
    for item in rows:
        example = qa_pair_of(item, separator)
        assert not isinstance(example, str)
        pool.add(example)
    return pool


def roles_and_contents(row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row["messages"]]


def first_variant(original: Row, pool: FewShotPool | None = None, **fields: Any) -> Row:
    result = variants(original, augment(**fields), pool or FewShotPool(), 17)
    assert not isinstance(result, str)
    return result[0].row


# Templates.


def test_template_renders_the_last_question_and_keeps_other_fields() -> None:
    original = row("first", "one", "second", "two", tools="[]", label=True, injected_corruption="cut", line=7)
    result = first_variant(original, templates=["Briefly: {question}!"])
    assert roles_and_contents(result) == [
        ("user", "first"),
        ("assistant", "one"),
        ("user", "Briefly: second!"),
        ("assistant", "two"),
    ]
    kept = ("group", "source", "line", "injected_corruption", "label", "tools")
    assert {name: result[name] for name in kept} == {name: original[name] for name in kept}
    assert result["id"] == row_id(result) != original["id"]
    assert roles_and_contents(original)[2] == ("user", "second"), "the row itself is unchanged"


@given(st.text(alphabet="{}{question}\\ %x", min_size=1).filter(str.strip))
def test_braces_in_a_question_are_kept(question: str) -> None:
    result = first_variant(row(question, "a"), templates=["{{x}} {question} {{question}}"])
    assert roles_and_contents(result)[0] == ("user", f"{{x}} {question} {{question}}")


def test_braces_in_examples_and_their_format_are_kept() -> None:
    pool = pool_of([row("{q}", "{answer} {0}")])
    few_shot = {"shots": 1, "layout": "prompt", "example": "{{{question}}} {{answer}} -> {answer} {{answer}}"}
    result = first_variant(row("{own}", "a"), pool, few_shot=few_shot)
    assert roles_and_contents(result)[0][1] == "{{q}} {answer} -> {answer} {0} {answer}\n\n{{own}} {answer} ->"


def test_copies_use_all_template_and_shot_combinations_before_repeating() -> None:
    fields = {"templates": ["A {question}", "B {question}"], "few_shot": {"shots": [0, 2]}, "copies": 6}
    pool = pool_of([row(f"q{number}", "a") for number in range(9)])
    result = variants(row("own", "a"), augment(**fields), pool, 17)
    assert not isinstance(result, str)
    assert sorted((variant.template, variant.shots) for variant in result) == [
        (t, s) for t in (0, 1) for s in (0, 1, 2)
    ]
    assert [variant.template for variant in result] in ([0, 1] * 3, [1, 0] * 3)


def test_one_copy_per_template_in_an_order_that_depends_on_the_row() -> None:
    templates = [f"{letter} {{question}}" for letter in "abcd"]
    orders = set()
    for number in range(20):
        result = variants(row(f"q{number}", "a"), augment(templates=templates, copies=4), FewShotPool(), 17)
        assert not isinstance(result, str)
        orders.add(tuple(variant.template for variant in result))
        assert sorted(orders.copy().pop()) == [0, 1, 2, 3]
    assert len(orders) > 5


def test_rows_without_a_question_have_no_variants() -> None:
    stage = augment(templates=["a {question}"])
    assert variants({"text": "plain", "messages": None, "id": "0" * 16}, stage, FewShotPool(), 1) == "no question"
    assert (
        variants({**row("q"), "messages": [{"role": "assistant", "content": "a"}]}, stage, FewShotPool(), 1)
        == "no question"
    )


# Examples.


def test_examples_are_messages_after_the_system_message_in_the_template_of_the_row() -> None:
    original = row("own", "mine")
    original["messages"] = conversation("own", "mine", system="be brief")
    other = {**row("other", "theirs"), "messages": conversation("other", "theirs", system="be brief")}
    without_system = row("unlike", "under no system")
    result = first_variant(
        original, pool_of([other, without_system]), templates=["Q {question}"], few_shot={"shots": 2}
    )
    assert roles_and_contents(result) == [
        ("system", "be brief"),
        ("user", "Q other"),
        ("assistant", "theirs"),
        ("user", "Q own"),
        ("assistant", "mine"),
    ]


def test_examples_in_the_prompt_end_before_the_answer_position() -> None:
    few_shot = {"shots": 1, "layout": "prompt"}
    result = first_variant(row("own", "mine"), pool_of([row("other", "theirs")]), few_shot=few_shot)
    assert roles_and_contents(result) == [("user", "Q: other\nA: theirs\n\nQ: own\nA:"), ("assistant", "mine")]
    zero_shot = first_variant(row("own", "mine"), few_shot={**few_shot, "shots": 0}, templates=["T {question}"])
    assert roles_and_contents(zero_shot)[0] == ("user", "T own"), "a zero-shot prompt is not in the example format"


def test_examples_exclude_the_row_and_its_group_and_have_distinct_groups() -> None:
    original = row("own", "mine", group="g")
    sibling = row("sibling", "x", group="G ")
    twins = [row("twin 1", "x", group="t"), row("twin 2", "x", group="t")]
    result = first_variant(original, pool_of([original, sibling, *twins]), few_shot={"shots": 4})
    assert len(result["messages"]) == 4
    assert roles_and_contents(result)[0][1].startswith("twin")
    ungrouped = [row("a", "b", group=None), row("c", "d", group=None)]
    without_group = first_variant(ungrouped[0], pool_of(ungrouped), few_shot={"shots": 2})
    assert [content for _, content in roles_and_contents(without_group)] == ["c", "d", "a", "b"], (
        "rows without a group do not share one"
    )


def test_multi_turn_rows_neither_get_nor_become_examples() -> None:
    pool = pool_of([row("other", "theirs")])
    for multi_turn, reason in (
        (row("one", "1", "two", "2"), "several turns"),
        (row("q", "a", tools='[{"function": {"name": "f"}}]'), "tools"),
    ):
        result = variants(multi_turn, augment(few_shot={"shots": 1}, templates=["T {question}"]), pool, 1)
        assert not isinstance(result, str)
        assert (result[0].shots, result[0].fewer) == (0, reason)
        assert roles_and_contents(result[0].row)[-2][1].startswith("T ")
        assert qa_pair_of(multi_turn, None) == reason
    assert qa_pair_of(row("q"), None) == "no answer"
    assert qa_pair_of(row("q", "bad", label=False), None) == "rated as bad"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(20, 200), st.sampled_from(["turns", "prompt"]))
def test_examples_never_make_a_row_longer_than_max_chars(lengths: list[int], max_chars: int, layout: str) -> None:
    pool = pool_of([row(f"{number}" * length, "a") for number, length in enumerate(lengths)])
    original = row("own", "mine")
    few_shot = {"shots": 8, "max_chars": max_chars, "layout": layout}
    result = variants(original, augment(few_shot=few_shot, templates=["{question}?"]), pool, 5)
    assert not isinstance(result, str)
    length = sum(len(content) for _, content in roles_and_contents(result[0].row))
    assert length <= max_chars
    assert (result[0].fewer == "") == (result[0].shots == 8)


def test_pool_is_bounded_and_independent_of_row_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_EXAMPLES", 10)
    rows = [row(f"q{number}", "a") for number in range(50)]
    results = []
    # A row that occurs a hundred times is in the pool once.
    for name, order in (("one", rows), ("other", [*[rows[3]] * 100, *rows[::-1]])):
        write_rows(order, tmp_path / name)
        pool = read_pool(tmp_path / name, Heldout([]), None, 100, 17)
        assert len(pool) == 10
        results.append(
            [example.id for example in pool.sample(("", False), 10, ("", 0), lambda _: True, hash_stream(1))]
        )
    assert results[0] == results[1]
    assert results[0] != sorted(results[0]), "in random order"


# Chains of thought.


def test_reasoned_form_has_the_cue_and_direct_form_drops_the_reasoning() -> None:
    original = row("2 + 2?", "Two and two #### no,\nare\n#### 4 ")
    reasoned = first_variant(original, templates=["Sum: {question}"], chain_of_thought={**COT, "direct": 0})
    assert roles_and_contents(reasoned) == [
        ("user", "Sum: 2 + 2?\nThink!"),
        ("assistant", "Two and two #### no,\nare\n#### 4 "),
    ]
    direct = first_variant(original, templates=["Sum: {question}"], chain_of_thought={**COT, "direct": 1})
    assert roles_and_contents(direct) == [("user", "Sum: 2 + 2?"), ("assistant", "4")]


@pytest.mark.parametrize("response", ["4", "#### 4", "reasons ####", "reasons #### \n"])
def test_response_without_reasoning_or_final_answer_is_unchanged(response: str) -> None:
    result = variants(row("q", response), augment(chain_of_thought={**COT, "direct": 1}), FewShotPool(), 1)
    assert not isinstance(result, str)
    assert result[0].form == "whole"
    assert roles_and_contents(result[0].row) == [("user", "q"), ("assistant", response)]


def test_judged_responses_keep_their_reasoning_and_prompts_get_the_cue() -> None:
    fields = {**COT, "direct": 1}
    rated = first_variant(row("q", "so #### 4", label=False), chain_of_thought=fields)
    rejected = [{"role": "assistant", "content": "no #### 5"}]
    pair = first_variant(row("q", "so #### 4", rejected=rejected), chain_of_thought=fields)
    for item in (rated, pair):
        assert roles_and_contents(item) == [("user", "q\nThink!"), ("assistant", "so #### 4")]
    assert (rated["label"], pair["rejected"]) == (False, rejected)
    assert (row_format(rated), row_format(pair)) == ("rated", "preference")
    assert roles_and_contents(first_variant(row("q"), chain_of_thought={**COT, "direct": 0})) == [("user", "q\nThink!")]
    assert roles_and_contents(first_variant(row("q"), chain_of_thought=fields)) == [("user", "q")]


def test_examples_have_reasoning_exactly_if_the_row_has() -> None:
    pool = pool_of([row("1 + 1?", "one and one #### 2"), row("hello?", "hi")], "####")
    original = row("2 + 2?", "two and two #### 4")
    fields = {"few_shot": {"shots": 2}, "templates": ["T {question}"]}
    reasoned = first_variant(original, pool, chain_of_thought={**COT, "direct": 0}, **fields)
    assert roles_and_contents(reasoned)[:2] == [("user", "T 1 + 1?\nThink!"), ("assistant", "one and one #### 2")]
    direct = first_variant(original, pool, chain_of_thought={**COT, "direct": 1}, **fields)
    assert roles_and_contents(direct)[:2] == [("user", "T 1 + 1?"), ("assistant", "2")]
    without_reasoning = first_variant(row("bye?", "bye"), pool, chain_of_thought=COT, **fields)
    assert roles_and_contents(without_reasoning)[:2] == [("user", "T hello?"), ("assistant", "hi")]


# Random numbers.


@given(st.integers(0, 50), st.integers())
def test_shuffled_is_a_permutation(count: int, key: int) -> None:
    assert sorted(shuffled(count, hash_stream(key))) == list(range(count))


@given(st.floats(0, 1), st.integers(1, 12), st.integers())
def test_fraction_of_copies_is_exact_in_every_row(share: float, copies: int, key: int) -> None:
    assert abs(sum(spread_evenly(share, copies, hash_stream(key))) - share * copies) < 1 + 1e-9
    if share == 0.5:
        assert copies // 2 <= sum(spread_evenly(share, copies, hash_stream(key))) <= (copies + 1) // 2


def test_hash_stream_is_platform_independent() -> None:
    sampled = hash_stream("a", 1)
    assert [next(sampled) % 1000 for _ in range(10)] == [257, 621, 540, 410, 611, 911, 586, 947, 823, 927]


# The stage.


def run(folder: Path, rows: list[Row], heldout: list[Row] | None = None, seed: int = 17, **fields: Any) -> StageResult:
    """Run the stage with the output folder/out."""
    artifacts = {"rows": rows, "held": heldout or []}
    for name, content in artifacts.items():
        write_rows(content, folder / name)
    out = folder / "out"
    out.mkdir(parents=True)
    context = stage_context(
        augment(heldout=["held"], **fields),
        {name: Artifact(folder / name, {"kind": "dataset", "fingerprint": name}, {}) for name in artifacts},
        folder,
        name="prompts",
        seed=seed,
        out=out,
    )
    return run_augment(context)


GROUPED = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=4, max_size=30)
"""(Group, question within it): few values, so that rows and groups repeat."""


@settings(max_examples=25)
@given(GROUPED, st.sets(st.integers(0, 9), max_size=4), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_held_out_rows_and_groups_are_dropped_and_every_row_is_counted(
    tmp_path_factory: pytest.TempPathFactory,
    keys: list[tuple[int, int]],
    heldout_groups: set[int],
    copies: int,
    originals: bool,
    shots: int,
) -> None:
    folder = tmp_path_factory.mktemp("augment")
    rows = [row(f"q{group}.{number}", f"a{group}.{number}", group=f"Group {group}") for group, number in keys]
    # Other rows of the held-out groups, with differently written group names.
    heldout = [row(f"held{group}", "x", group=f" group  {group}") for group in heldout_groups]
    fields = {"templates": ["A {question}", "B {question}"], "few_shot": {"shots": [0, shots]}, "copies": copies}
    if len({group for group, _ in keys} - heldout_groups) < 1 or (shots == 0 and copies > 2):
        return
    facts = run(folder, rows, heldout, originals=originals, **fields).facts
    result = list(read_rows(folder / "out"))
    dropped = [json.loads(line) for line in (folder / "out" / "dropped.jsonl").read_text().splitlines()]
    augmented = [key for key in keys if key[0] not in heldout_groups]
    assert len(dropped) == facts["heldout"] == len(keys) - len(augmented)
    assert facts["augmented"] == len(augmented)
    assert len(result) == facts["rows"] == len(augmented) * (copies + originals) - facts["repeated"]
    for item in result:
        group = int(item["group"].removeprefix("Group "))
        groups = [
            int(message["content"].split("q")[-1].split(".")[0])
            for message in item["messages"]
            if message["role"] == "user"
        ]
        assert groups[-1] == group
        assert not set(groups) & heldout_groups
        assert len(set(groups)) == len(groups), "no example of the row's group, and no two of the same group"
        assert item["id"] == row_id(item)


def reasoning_rows() -> list[Row]:
    return [row(f"question {number}", f"because #### {number}") for number in range(40)]


def all_fields(**fields: Any) -> dict[str, Any]:
    return {
        "templates": ["A {question}", "B {question}"],
        "few_shot": {"shots": [0, 2]},
        "chain_of_thought": {**COT, "direct": 0.5},
        "copies": 3,
        **fields,
    }


def test_output_bytes_depend_only_on_the_seed(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(tmp_path / name, reasoning_rows(), seed=seed, **all_fields())
        contents.append((tmp_path / name / "out" / "rows" / "part-00000.parquet").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_variants_do_not_depend_on_the_row_position(tmp_path: Path) -> None:
    ids = []
    for name, rows in (("one", reasoning_rows()), ("reversed", reasoning_rows()[::-1])):
        run(tmp_path / name, rows, **all_fields())
        ids.append(sorted(item["id"] for item in read_rows(tmp_path / name / "out")))
    assert ids[0] == ids[1]


def test_facts_count_the_variants(tmp_path: Path) -> None:
    rows = [*reasoning_rows(), {"text": "plain", "id": "ab" * 8, "group": "plain", "source": "t.txt", "line": 3}]
    facts = run(tmp_path, rows, [rows[0]], originals=True, **all_fields()).facts
    result = list(read_rows(tmp_path / "out"))
    assert (facts["rows_in"], facts["augmented"], facts["heldout"]) == (41, 39, 1)
    assert facts["unchanged"] == {"no question": 1}
    assert facts["variants"] == sum(facts["shots"].values()) == sum(facts["response_forms"].values())
    assert facts["rows"] == len(result) == 39 + 1 + facts["variants"]
    assert facts["variants"] + facts["repeated"] == 3 * 39
    assert abs(facts["response_forms"]["direct"] - facts["response_forms"]["reasoned"]) <= 39
    assert facts["examples"] == {"usable": 39, "pool_size": 39, "unusable": {"held out": 1, "no answer": 1}}
    assert [item["text"] for item in result if item["text"]] == ["plain"]
    assert json.loads((tmp_path / "out" / "dropped.jsonl").read_text())["rule"] == "held out"
    assert len(facts["samples"]["rows"]) == 3
    assert "user: " in facts["samples"]["rows"][0]["after"]


def test_duplicate_variants_are_omitted_and_counted(tmp_path: Path) -> None:
    # Both variants of a rated row keep the reasoning, so they are equal.
    rows = [row("q", "so #### 4", label=True)]
    facts = run(tmp_path, rows, chain_of_thought={**COT, "direct": 0.5}, copies=2).facts
    assert (facts["rows"], facts["repeated"]) == (1, 1)


@pytest.mark.parametrize(
    ("heldout", "fields", "words"),
    [
        (reasoning_rows(), {"templates": ["A {question}"]}, ["no row of 40 can be augmented", "held out: 40"]),
        ([], {"chain_of_thought": {"separator": "=>"}}, ["no response contains reasoning, `=>`", "separator"]),
        (reasoning_rows(), {"few_shot": {"shots": 1}}, ["no row of `rows` can serve as an example", "held out: 40"]),
        ([], {"few_shot": {"shots": 1, "max_chars": 3}}, ["serve as an example", "longer than max_chars: 40"]),
    ],
)
def test_augmentation_without_effect_is_an_error(
    tmp_path: Path, heldout: list[Row], fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(StageError) as caught:
        run(tmp_path, reasoning_rows(), heldout, **fields)
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)


def test_missing_row_fails_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "write_rows", lambda rows, folder: write_rows(list(rows)[1:], folder))
    with pytest.raises(RowCountError, match="40 rows were built, 39 written"):
        run(tmp_path, reasoning_rows(), templates=["A {question}"])

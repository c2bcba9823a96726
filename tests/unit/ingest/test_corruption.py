"""Injected corruption: the requested amount, all kinds, correctly recorded, and deterministic."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.ingest import corruption as corrupt_module
from tunery.ingest.corruption import KINDS, Row, corrupt

WORDS = [
    "the",
    "parser",
    "returns",
    "a",
    "tuple",
    "with",
    "every",
    "option",
    "and",
    "leaves",
    "unknown",
    "ones",
]


RowFactory = Callable[[int], list[Row]]


def sentence(number: int, length: int = 14) -> str:
    rng = random.Random(number)
    return f"Entry {number}: " + " ".join(rng.choice(WORDS) for _ in range(length)) + "."


def text_rows(count: int) -> list[Row]:
    return [{"text": sentence(number), "group": f"g{number}"} for number in range(count)]


def chat_rows(count: int) -> list[Row]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is entry {number}?"},
                {"role": "assistant", "content": sentence(number)},
            ],
            "group": f"g{number}",
        }
        for number in range(count)
    ]


def content(row: Row) -> str:
    text = row["text"] if "text" in row else row["messages"][-1]["content"]
    assert isinstance(text, str)
    return text


def corrupted_pairs(kind: str, rows: list[Row]) -> list[tuple[str, str]]:
    """Corrupt all rows; return (original, corrupted) contents of those with this kind of corruption."""
    corrupted = corrupt(rows, 1.0, seed=3)
    return [
        (content(old), content(new))
        for old, new in zip(rows, corrupted, strict=True)
        if new["injected_corruption"] == kind
    ]


TEXTS_AND_CHATS = pytest.mark.parametrize("make_rows", [text_rows, chat_rows])


@TEXTS_AND_CHATS
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.333, 1.0])
def test_share_is_exact_and_corrupted_rows_are_marked(make_rows: RowFactory, share: float) -> None:
    rows = make_rows(101)
    corrupted = corrupt(rows, share, seed=0)
    assert len(corrupted) == len(rows)
    assert sum(row["injected_corruption"] != "" for row in corrupted) == round(share * 101)
    for old, new in zip(rows, corrupted, strict=True):
        assert (content(old).split() != content(new).split()) == (new["injected_corruption"] != "")
        assert new["injected_corruption"] in ("", *KINDS)


@TEXTS_AND_CHATS
def test_kinds_get_equal_shares(make_rows: RowFactory) -> None:
    kinds = Counter(row["injected_corruption"] for row in corrupt(make_rows(203), 0.5, seed=1))
    counts = [kinds[kind] for kind in KINDS]
    assert max(counts) - min(counts) <= 1


def test_kind_of_a_single_corrupted_row_depends_on_the_seed() -> None:
    kinds = {row["injected_corruption"] for seed in range(40) for row in corrupt(text_rows(10), 0.1, seed)}
    assert kinds == {"", *KINDS}


@TEXTS_AND_CHATS
def test_only_the_content_changes(make_rows: RowFactory) -> None:
    rows = make_rows(60)
    for old, new in zip(rows, corrupt(rows, 0.6, seed=5), strict=True):
        assert set(new) == {*old, "injected_corruption"}
        assert new["group"] == old["group"]
        if "messages" in old:
            assert new["messages"][:-1] == old["messages"][:-1]
            assert new["messages"][-1]["role"] == "assistant"


@TEXTS_AND_CHATS
def test_input_rows_are_not_modified(make_rows: RowFactory) -> None:
    rows = make_rows(60)
    before = copy.deepcopy(rows)
    corrupt(rows, 1.0, seed=5)
    assert rows == before


def test_corruption_depends_on_the_seed_only() -> None:
    rows = chat_rows(80)
    assert corrupt(rows, 0.3, seed=7) == corrupt(rows, 0.3, seed=7)
    assert corrupt(rows, 0.3, seed=7) != corrupt(rows, 0.3, seed=8)


def test_result_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import json, sys\n"
        "from tunery.ingest.corruption import corrupt\n"
        "print(json.dumps(corrupt(json.load(sys.stdin), 0.5, 11)))"
    )
    rows = chat_rows(40) + text_rows(40)
    results = [
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(rows),
            env={
                **os.environ,
                "PYTHONPATH": str(Path(corrupt_module.__file__).parents[2]),
                "PYTHONHASHSEED": hash_seed,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert results[0] == results[1]
    assert json.loads(results[0]) == corrupt(rows, 0.5, 11)


@TEXTS_AND_CHATS
def test_shuffled_rows_have_the_same_words_and_the_same_layout(make_rows: RowFactory) -> None:
    rows = make_rows(80)
    pairs = corrupted_pairs("shuffled", rows)
    assert pairs
    for old, new in pairs:
        assert sorted(old.split()) == sorted(new.split())
    lines = [{"text": f" one {number}\n\n  two three\n- four five\n"} for number in range(40)]
    for old, new in corrupted_pairs("shuffled", lines):
        assert re.findall(r"\s+", old) == re.findall(r"\s+", new)


def test_swapped_responses_come_from_another_row() -> None:
    rows = chat_rows(80)
    responses = {content(row) for row in rows}
    pairs = corrupted_pairs("swapped", rows)
    assert pairs
    assert all(new in responses and new != old for old, new in pairs)


def test_swapped_texts_keep_their_first_half_and_end_like_another_row() -> None:
    rows = text_rows(80)
    pairs = corrupted_pairs("swapped", rows)
    assert pairs
    for old, new in pairs:
        assert new.startswith(old[: len(old) * 3 // 10])
        assert any(new.endswith(content(row)[-20:]) for row in rows if content(row) != old)


@TEXTS_AND_CHATS
def test_cut_rows_stop_within_a_word_at_a_fifth_to_three_fifths(make_rows: RowFactory) -> None:
    pairs = corrupted_pairs("cut", make_rows(80))
    assert pairs
    for old, new in pairs:
        assert old.startswith(new)
        assert 0.2 <= len(new) / len(old) <= 0.6
        assert old[len(new) - 1].isalnum()
        assert old[len(new)].isalnum()


@TEXTS_AND_CHATS
def test_repeated_rows_repeat_one_phrase_up_to_about_the_original_length(make_rows: RowFactory) -> None:
    pairs = corrupted_pairs("repeated", make_rows(80))
    assert pairs
    for old, new in pairs:
        words = new.split()
        period = next(n for n in range(1, len(words)) if words == (words[:n] * len(words))[: len(words)])
        assert len(words) / period >= 3
        assert " ".join(words[:period]) in " ".join(old.split())
        assert 0.9 * len(old) <= len(new) <= 2 * len(old)


def test_rows_too_short_for_a_kind_get_another_kind() -> None:
    rows: list[Row] = [{"messages": [{"role": "assistant", "content": word}]} for word in ("y", "n") * 20]
    corrupted = corrupt(rows, 1.0, seed=2)
    kinds = Counter(row["injected_corruption"] for row in corrupted)
    assert kinds == {"swapped": 20, "repeated": 20}
    assert all(content(old) != content(new) for old, new in zip(rows, corrupted, strict=True))


def test_empty_rows_are_not_corrupted_if_others_suffice() -> None:
    rows: list[Row] = [{"text": ""}, *text_rows(9)]
    for seed in range(20):
        corrupted = corrupt(rows, 0.9, seed)
        assert corrupted[0]["injected_corruption"] == ""
        assert all(row["injected_corruption"] for row in corrupted[1:])


def test_share_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"only 9 of 10 rows can be corrupted, but share 1\.0 requires 10"):
        corrupt([{"text": ""}, *text_rows(9)], 1.0, seed=0)


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [
        ([{"text": "a"}], 1.5, "share is 1.5"),
        ([{"text": "a"}], -0.1, "share is -0.1"),
        ([{"text": "a"}, {"prompt": "b"}], 0.5, "row 1 has neither 'text' nor 'messages'"),
        ([{"messages": []}], 0.5, "row 0 has neither"),
        ([{"text": None}], 0.5, "row 0 has NoneType"),
        ([{"text": "a", "injected_corruption": ""}], 0.5, "row 0 already has the key 'injected_corruption'"),
    ],
)
def test_invalid_arguments_are_rejected(rows: list[Row], share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrupt(rows, share, seed=0)


def test_no_rows_give_no_rows() -> None:
    assert corrupt([], 0.5, seed=0) == []


@given(
    st.lists(st.text(alphabet="ab é.\n\x1c\x85\u00a0\u200b", max_size=60).filter(str.strip), max_size=30),
    st.floats(min_value=0, max_value=1),
    st.integers(),
    st.booleans(),
)
def test_count_is_exact_and_content_changes_for_any_rows(
    contents: list[str], share: float, seed: int, chat: bool
) -> None:
    rows: list[Row] = [{"text": text} for text in contents]
    if chat:
        rows = [{"messages": [{"role": "assistant", "content": text}]} for text in contents]
    corrupted = corrupt(rows, share, seed)
    assert sum(row["injected_corruption"] != "" for row in corrupted) == round(share * len(rows))
    for old, new in zip(rows, corrupted, strict=True):
        assert (content(old).split() != content(new).split()) == (new["injected_corruption"] != "")

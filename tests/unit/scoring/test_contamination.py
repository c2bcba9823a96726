"""n-grams of evaluation sets in rows."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_rows import hostile_rows, response_row, text_row

from tunery.scoring.scorers.contamination import MIN_SHARED_WORDS, ContaminationScorer, NgramIndex
from tunery.scoring.scorers.ngrams import Words
from tunery.spec import Contamination
from tunery.store.rows import Row, write_rows

LETTERS = list("abcdefghijklmnopqrstuvwxyz")


def contamination_scorer(tmp_path: Path, sets: dict[str, list[Row]], **settings: object) -> ContaminationScorer:
    for name, rows in sets.items():
        write_rows(rows, tmp_path / name)
    spec = Contamination.model_validate({"contamination": {"sets": tuple(sets), **settings}})
    return ContaminationScorer(spec, {name: tmp_path / name for name in sets})


def words(start: int, end: int) -> str:
    return " ".join(LETTERS[start:end])


def test_score_is_the_fraction_of_ngrams_that_occur_in_a_set(tmp_path: Path) -> None:
    # Words 0 to 20 of the row have eight 13-grams; words 3 to 18 of the set have three of them.
    scorer = contamination_scorer(tmp_path, {"test": [text_row(words(3, 18))]})
    assert scorer([text_row(words(0, 20)), text_row(words(12, 26))]) == {"score": [3 / 8, 0.0], "set": ["test", ""]}


def test_case_and_punctuation_do_not_hide_a_copy(tmp_path: Path) -> None:
    scorer = contamination_scorer(tmp_path, {"test": [response_row(words(0, 13))]}, of="response")
    assert scorer([response_row(words(0, 13).upper().replace(" ", ", ") + "!")])["score"] == [1.0]


@pytest.mark.parametrize(
    ("row", "score"),
    [
        (words(0, 5), 1.0),  # the same short text
        (words(0, 4), 0.0),  # four words of it: too few
        (words(10, 18), 1.0),  # eight words of a long text
        (words(10, 17), 0.0),  # seven words of it: too few
    ],
)
def test_short_row_is_a_single_ngram(tmp_path: Path, row: str, score: float) -> None:
    scorer = contamination_scorer(tmp_path, {"test": [text_row(words(0, 5)), text_row(words(6, 24))]})
    assert scorer([text_row(row)])["score"] == [score]


def test_short_text_of_a_set_is_found_in_a_longer_row(tmp_path: Path) -> None:
    scorer = contamination_scorer(tmp_path, {"test": [text_row(words(4, 13))]})
    # Words 4 to 13 are in the n-grams that start at 0 to 4, of eight.
    assert scorer([text_row(words(0, 20))])["score"] == [5 / 8]
    scorer = contamination_scorer(tmp_path / "few", {"test": [text_row(words(4, 11))]})
    assert scorer([text_row(words(0, 20))])["score"] == [0.0]


def test_matches_of_all_sets_are_combined_and_the_best_set_is_named(tmp_path: Path) -> None:
    scorer = contamination_scorer(tmp_path, {"one": [text_row(words(0, 14))], "two": [text_row(words(2, 18))]})
    assert scorer([text_row(words(0, 20))]) == {"score": [6 / 8], "set": ["two"]}


@pytest.mark.parametrize(("of", "score"), [("prompt", 1.0), ("response", 0.0)])
def test_same_part_of_rows_and_sets_is_compared(tmp_path: Path, of: str, score: float) -> None:
    scorer = contamination_scorer(tmp_path, {"test": [response_row("yes", "What is it?")]}, of=of)
    assert scorer([response_row("no", "What is it?")])["score"] == [score]


def test_characters_of_scripts_without_spaces_are_words(tmp_path: Path) -> None:
    text = "该函数返回目录中所有文件的列表如果值为负数"
    scorer = contamination_scorer(tmp_path, {"test": [text_row(text)]})
    assert scorer([text_row("前言" + text[:13])])["score"] == [pytest.approx(1 / 3)]


def test_row_without_words_has_no_score(tmp_path: Path) -> None:
    columns = contamination_scorer(tmp_path, {"test": [text_row("")]})([text_row("?!"), text_row("word")])
    assert math.isnan(columns["score"][0])
    assert columns["score"][1] == 0


@settings(max_examples=20)
@given(rows=st.lists(hostile_rows, max_size=4))
def test_hostile_rows_are_scored(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> None:
    scorer = contamination_scorer(tmp_path_factory.mktemp("sets"), {"test": rows})
    columns = scorer(rows)
    assert [len(values) for values in columns.values()] == [len(rows)] * 2
    assert all(score == 1 or math.isnan(score) for score in columns["score"])


def brute_force(text: str, set_texts: list[str], n: int) -> list[bool]:
    """Return whether each n-gram of a text occurs in a set; every character stands for a word."""

    def in_a_set(ngram: str) -> bool:
        return any(ngram in set_text for set_text in set_texts)

    if len(text) < n:
        return [text in set_texts or (len(text) >= min(MIN_SHARED_WORDS, n) and in_a_set(text))]
    short = [set_text for set_text in set_texts if MIN_SHARED_WORDS <= len(set_text) < n]
    ngrams = [text[start : start + n] for start in range(len(text) - n + 1)]
    return [in_a_set(ngram) or any(set_text in ngram for set_text in short) for ngram in ngrams]


def test_matches_equal_a_brute_force_search() -> None:
    rng = random.Random(0)

    def random_text() -> str:
        # Texts of many a's and a few b's, so that texts of a set sometimes occur in rows.
        start = rng.randint(0, 12)
        return "aaabaaaaaaaabaaaaaaaaaaaaabaa"[start : start + rng.randint(1, 17)]

    for _ in range(1500):
        n = rng.choice([3, 9, 10, 13])
        texts = [random_text() for _ in range(rng.randint(1, 3))]
        set_texts = [random_text() for _ in range(rng.randint(0, 4))]
        rows = Words.of([" ".join(text) for text in texts])
        hits = NgramIndex(n, [Words.of([" ".join(text)]) for text in set_texts]).match(rows)
        for number, text in enumerate(texts):
            assert hits[(rows.text == number) & rows.starts(n)].tolist() == brute_force(text, set_texts, n)
        assert not hits[~rows.starts(n)].any()

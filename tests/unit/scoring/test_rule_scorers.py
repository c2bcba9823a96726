"""Rule-based row scorers (length, Gopher, C4 and language) against hand-worked cases."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_rows import hostile_rows, prompt_row, response_row, text_row

from tunery.scoring.scorers import c4, gopher
from tunery.scoring.scorers.c4 import C4Scorer
from tunery.scoring.scorers.gopher import GopherScorer
from tunery.scoring.scorers.gopher_limits import limits
from tunery.scoring.scorers.interfaces import RowScorer
from tunery.scoring.scorers.language import LanguageScorer
from tunery.scoring.scorers.length import LengthScorer
from tunery.spec import C4, C4Rules, Gopher, GopherRules, Language, Length
from tunery.spec.scorers.language_codes import LANGUAGES
from tunery.store.rows import Row

# Length.


@pytest.mark.parametrize(
    ("unit", "row", "score", "prompt_length"),
    [
        ("words", response_row("two  words", "Why is that?"), 2, 3),
        ("chars", response_row("né\n", "Why?"), 3, 4),
        ("lines", response_row("a\n\n  \nb c\n", "x"), 2, 1),
        ("words", text_row("a plain text"), 3, math.nan),
        ("words", response_row("", "Why?"), 0, 1),
        ("words", prompt_row("Why is that?"), math.nan, 3),
    ],
)
def test_length_scores_the_response_and_lists_the_prompt_length(
    unit: str, row: Row, score: float, prompt_length: float
) -> None:
    columns = LengthScorer(Length.model_validate({"length": unit}), {})([row])
    assert columns == {
        "score": [pytest.approx(score, nan_ok=True)],
        "prompt": [pytest.approx(prompt_length, nan_ok=True)],
    }


@pytest.mark.parametrize(("of", "words"), [("response", 1), ("prompt", 2), ("all", 3)])
def test_length_is_of_the_requested_part(of: str, words: int) -> None:
    spec = Length.model_validate({"length": "words", "of": of})
    assert LengthScorer(spec, {})([response_row("three", "one two")])["score"] == [words]


# Gopher.

OFF = {field: None for field in GopherRules.model_fields if field != "of"}
PAPER = {
    "words_min": 50,
    "words_max": 100_000,
    "mean_word_min": 3,
    "mean_word_max": 10,
    "hashes_max": 0.1,
    "ellipses_max": 0.1,
    "bullet_lines_max": 0.9,
    "ellipsis_lines_max": 0.3,
    "alphabetic_words_min": 0.8,
    "stop_words_min": 2,
    "duplicate_lines_max": 0.3,
    "duplicate_paragraphs_max": 0.3,
    "duplicate_line_chars_max": 0.2,
    "duplicate_paragraph_chars_max": 0.2,
    "top_2gram_max": 0.2,
    "top_3gram_max": 0.18,
    "top_4gram_max": 0.16,
    "duplicate_5grams_max": 0.15,
    "duplicate_6grams_max": 0.14,
    "duplicate_7grams_max": 0.13,
    "duplicate_8grams_max": 0.12,
    "duplicate_9grams_max": 0.11,
    "duplicate_10grams_max": 0.10,
}


def test_english_limits_equal_those_of_the_paper() -> None:
    assert limits(GopherRules(), "Latin", "en") == PAPER


def repeated_letters(n: int) -> str:
    """Return n words of one letter, another word, and the n words again."""
    letters = " ".join("abcdefghij"[:n])
    return f"{letters} x {letters}"


RULE_VALUES = [
    ("words_min", "one two three", 3),
    ("words_max", "one two three", 3),
    ("mean_word_min", "ab abc", 2.5),
    ("mean_word_max", "ab abc", 2.5),
    ("hashes_max", "#a ## b c", 0.75),
    ("ellipses_max", "a... b… c d", 0.5),
    ("bullet_lines_max", "- a\n• b\n* c\n-1\n*args\n", 0.6),
    ("ellipsis_lines_max", "a...\nb… \nc... d\ne", 0.5),
    ("alphabetic_words_min", "a 1b c 2 +", 0.6),
    ("stop_words_min", "The, cat and THE dog be", 3),
    ("duplicate_lines_max", "a\nb\n\n  a\nc", 0.25),
    ("duplicate_paragraphs_max", "a\nb\n\nc\n  \na\nb\n\nb", 0.25),
    ("duplicate_line_chars_max", "aaa\nb\nb", 0.2),
    ("duplicate_paragraph_chars_max", "aaa\n\nb\n\nb", 0.2),
    ("top_2gram_max", "a b x y z a b", 4 / 7),
    ("top_2gram_max", "aa bb x aa bb y c d z c d", 8 / 15),  # of two equally frequent 2-grams, the longer
    ("top_2gram_max", "c d c d c d aa bbbb aa bbbb", 6 / 18),  # of the most frequent 2-gram, not of the longest
    ("top_2gram_max", "a a a bbbbbb", 4 / 9),  # (a a) twice
    ("top_3gram_max", repeated_letters(3), 6 / 7),
    ("top_4gram_max", repeated_letters(4), 8 / 9),
    *((f"duplicate_{n}grams_max", repeated_letters(n), n / (2 * n + 1)) for n in range(5, 11)),
    ("duplicate_5grams_max", repeated_letters(6), 6 / 13),  # two 5-grams that overlap
]


@pytest.mark.parametrize(("rule", "text", "value"), RULE_VALUES)
def test_gopher_rule_is_violated_above_its_limit_only(rule: str, text: str, value: float) -> None:
    def names(limit: float | None) -> list[str] | None:
        return gopher.violated(text, GopherRules.model_validate({**OFF, rule: limit}))

    step = (1 if isinstance(value, int) else 1e-6) * (1 if rule.endswith("_min") else -1)
    assert names(value if isinstance(value, int) else value - step / 1000) == []
    assert names(value + step) == [rule]
    assert names(None) == []


def test_every_gopher_rule_has_a_case() -> None:
    assert {rule for rule, _, _ in RULE_VALUES} == set(OFF)


def test_fraction_of_overlapping_occurrences_is_at_most_one() -> None:
    assert gopher.violated("a a a a", GopherRules.model_validate({**OFF, "top_2gram_max": 1.0})) == []


def test_unique_words_are_not_a_repetition() -> None:
    limits = {**OFF, "top_2gram_max": 0.0, "duplicate_5grams_max": 0.0}
    assert gopher.violated("a b c d e f g", GopherRules.model_validate(limits)) == []


def test_ordinary_text_passes_and_a_repetitive_one_violates_all_repetition_rules() -> None:
    page = (
        "The reader opens a file and returns every line of it in turn. It closes the file when there are no more lines,"
        " or when somebody stops asking.\nErrors that the system reports are raised as they are, with the name of the"
        " file in them, so that whoever called can say to the user what went wrong and where. Buffers have the size"
        " which the disk prefers; set another one where you know better."
    )
    columns = GopherScorer(Gopher(gopher=GopherRules()), {})(
        [response_row(page), response_row("what is it that asks " * 40)]
    )
    assert columns["score"][0] == 0
    assert columns["rules"][0] == ""
    assert set(columns["rules"][1].split(", ")) == {"stop_words_min"} | {rule for rule in PAPER if "gram" in rule}


def test_complete_row_is_scored_if_requested() -> None:
    row = response_row("one two three", "four five six")
    for of, violations in (("response", 1), ("all", 0)):
        rules = GopherRules.model_validate({**OFF, "words_min": 4, "of": of})
        assert GopherScorer(Gopher(gopher=rules), {})([row])["score"] == [violations]


# C4.

C4_OFF = {
    "terminal_punctuation": False,
    "line_words_min": None,
    "javascript": False,
    "policy": False,
    "sentences_min": None,
    "lorem_ipsum": False,
    "braces": False,
}


@pytest.mark.parametrize(
    ("rule", "on", "good", "bad"),
    [
        ("terminal_punctuation", True, 'It ends.\nIt "ends"\nSo.\nno end', "It ends.\nIt does not\nnor this"),
        ("line_words_min", 5, "one two three four five", "one two three four"),
        ("javascript", True, "Java is a script.", "Please enable JavaScript."),
        ("policy", True, "This is our policy.", "See our Privacy Policy."),
        ("policy", True, "A cookie is eaten.", "This site uses cookies."),
        ("sentences_min", 3, "One. Two! Three?", "Version 1.2.3 of a.b. Is out"),
        ("sentences_min", 3, "first line\nsecond line\nthird line", "first line\nsecond line"),
        ("lorem_ipsum", True, "lorem and ipsum", "Lorem Ipsum dolor"),
        ("braces", True, "f(x)[0]", "f {x}"),
    ],
)
def test_c4_rule_is_violated_only_by_the_bad_text(rule: str, on: object, good: str, bad: str) -> None:
    rules = C4Rules.model_validate({**C4_OFF, rule: on})
    assert c4.violated(good, rules) == []
    assert c4.violated(bad, rules) == [rule]
    assert c4.violated(bad, C4Rules.model_validate(C4_OFF)) == []


def test_sentences_are_counted_in_lines_that_pass_the_line_rules() -> None:
    text = "This line is long enough. It has three sentences. Here.\nToo short."
    fields = {**C4_OFF, "line_words_min": 5, "sentences_min": 4}
    assert c4.violated(text, C4Rules.model_validate(fields)) == ["sentences_min"]
    assert c4.violated(text, C4Rules.model_validate({**fields, "line_words_min": None})) == []


def test_fraction_of_failing_lines_is_configurable() -> None:
    text = "This line does end.\nThis one does not"
    fields = {**C4_OFF, "terminal_punctuation": True}
    assert c4.violated(text, C4Rules.model_validate(fields)) == []
    assert c4.violated(text, C4Rules.model_validate({**fields, "failing_lines_max": 0})) == ["terminal_punctuation"]


def test_c4_scores_the_requested_part_and_names_the_rules() -> None:
    row = response_row("The first. The second of them. And a third sentence.", "What does {} do?")
    for of, names in (("response", ""), ("all", "braces")):
        columns = C4Scorer(C4(c4=C4Rules.model_validate({"of": of})), {})([row])
        assert columns == {"score": [float(bool(names))], "rules": [names]}


# Language.


@pytest.fixture(scope="module")
def english() -> LanguageScorer:
    return LanguageScorer(Language(language="en"), {})


@pytest.mark.parametrize(
    ("text", "detected", "low", "high"),
    [
        ("The function returns a list of all files in the directory.", "en", 0.5, 1),
        ("Die Funktion gibt eine Liste aller Dateien im Verzeichnis zurück.", "de", 0, 0.1),
        ("该函数返回目录中所有文件的列表。", "zh", 0, 0.1),
        ("يفتح الملف ويقرأه سطرا بسطر.", "ar", 0, 0.1),
    ],
)
def test_score_is_the_probability_and_the_detected_language_is_listed(
    english: LanguageScorer, text: str, detected: str, low: float, high: float
) -> None:
    columns = english([response_row(text)])
    assert columns["detected"] == [detected]
    assert low <= columns["score"][0] <= high


def test_text_without_letters_has_no_language(english: LanguageScorer) -> None:
    columns = english([response_row(text) for text in ("", "1 + 1 = 2", "😀", " \n")])
    assert columns["detected"] == [""] * 4
    assert all(map(math.isnan, columns["score"]))


def test_every_language_of_the_detector_is_accepted(english: LanguageScorer) -> None:
    assert set(LANGUAGES) == set(english._identifier.labels) - {"zxx"}
    assert tuple(sorted(LANGUAGES)) == LANGUAGES


# Properties of all rule scorers.


@pytest.fixture(scope="module")
def scorers(english: LanguageScorer) -> list[RowScorer]:
    return [
        LengthScorer(Length(length="words"), {}),
        GopherScorer(Gopher(gopher=GopherRules()), {}),
        C4Scorer(C4(c4=C4Rules()), {}),
        english,
    ]


@settings(max_examples=60)
@given(rows=st.lists(hostile_rows, max_size=4))
def test_hostile_rows_are_scored_by_every_rule(scorers: list[RowScorer], rows: list[Row]) -> None:
    for scorer in scorers:
        for values in scorer(rows).values():
            assert len(values) == len(rows)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_unscorable_rows_have_no_score(scorers: list[RowScorer], index: int) -> None:
    rows = [response_row(""), response_row(" \n\t"), prompt_row("Why?")]
    assert all(map(math.isnan, scorers[index](rows)["score"]))


@pytest.mark.parametrize("text", ["same words over and over ", "\u0315\u0300", "x.", "\n- "])
def test_megabyte_of_text_takes_linear_time(scorers: list[RowScorer], text: str) -> None:
    row = response_row("")
    row["messages"][-1]["content"] = text * (1_000_000 // len(text))
    for scorer in scorers:
        started = time.process_time()
        scorer([row])
        assert time.process_time() - started < 3

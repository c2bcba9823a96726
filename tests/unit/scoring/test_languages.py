"""Row scorers in languages other than English: good responses pass, bad ones do not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from responses_in_languages import SENTENCES, responses
from scorer_rows import response_row, score_corpus, text_row

from tunery.scoring.scorers import c4, gopher
from tunery.scoring.scorers.c4 import C4Scorer
from tunery.scoring.scorers.contamination import ContaminationScorer
from tunery.scoring.scorers.gopher import GopherScorer
from tunery.scoring.scorers.gopher_limits import ENGLISH, LANGUAGES, STOP_WORDS, limits
from tunery.scoring.scorers.language import LanguageScorer
from tunery.scoring.scorers.length import LengthScorer
from tunery.scoring.scorers.near_duplicates import NearDuplicatesScorer
from tunery.spec import (
    C4,
    C4Rules,
    Contamination,
    Gopher,
    GopherRules,
    Language,
    Length,
    NearDuplicates,
)
from tunery.spec.scorers.language_codes import LANGUAGES as DETECTED
from tunery.spec.scorers.language_codes import MACROLANGUAGES
from tunery.store.rows import write_rows

LANGUAGE = pytest.mark.parametrize("language", SENTENCES)


# Good responses.


@LANGUAGE
def test_length_of_good_responses_is_in_the_range_of_english_ones(language: str) -> None:
    rows = [response_row(response) for response in responses(language, 100)]
    scores = LengthScorer(Length(length="words"), {})(rows)["score"]
    assert all(3 <= score <= 500 for score in scores)
    assert 50 <= sum(scores) / 100 <= 250


@LANGUAGE
def test_gopher_without_settings_keeps_good_responses(language: str) -> None:
    rows = [response_row(response) for response in responses(language, 100)]
    columns = GopherScorer(Gopher(gopher=GopherRules()), {})(rows)
    assert sum(score == 0 for score in columns["score"]) >= 98, columns["rules"]


@LANGUAGE
def test_c4_without_settings_keeps_good_responses(language: str) -> None:
    rows = [response_row(response) for response in responses(language, 100)]
    assert C4Scorer(C4(c4=C4Rules()), {})(rows)["score"] == [0] * 100


@pytest.mark.parametrize("language", ["de", "zh", "ja", "hi", "th", "ar", "ru"])
def test_response_with_code_is_scored_in_its_language(language: str) -> None:
    code = "\n\n    with open(path, encoding=encoding) as lines:\n        return list(lines)\n\n"
    response = "".join(responses(language, 1)[0].replace("\n\n", code))
    rules = GopherRules(alphabetic_words_min=None)
    assert gopher.violated(response, rules) == []


# Bad responses.


@LANGUAGE
def test_repeated_sentence_violates_the_repetition_rules(language: str) -> None:
    text = (SENTENCES[language][0] + " ") * 12
    assert {"duplicate_5grams_max", "duplicate_10grams_max"} <= set(gopher.violated(text, GopherRules()) or ())


@pytest.mark.parametrize("language", ["zh", "hi", "th", "ru"])
def test_list_of_nouns_has_too_few_stop_words(language: str) -> None:
    nouns = {
        "zh": "苹果、香蕉、桌子、椅子、窗户、电脑、手机、汽车、飞机、轮船、学校、医院、老师、医生、学生、工人",
        "hi": "सेब केला मेज़ कुर्सी खिड़की कंप्यूटर मोबाइल गाड़ी जहाज़ विद्यालय अस्पताल शिक्षक डॉक्टर छात्र",
        "th": "แอปเปิล กล้วย โต๊ะ เก้าอี้ หน้าต่าง คอมพิวเตอร์ โทรศัพท์ รถยนต์ เครื่องบิน โรงเรียน หมอ ครู",
        "ru": "яблоко банан стол стул окно компьютер телефон машина самолёт школа больница учитель врач",
    }[language]
    assert gopher.violated(nouns, GopherRules(words_min=None)) == ["stop_words_min"]


def test_concatenated_words_are_too_long_in_each_script() -> None:
    for language in ("en", "de", "hi", "ko", "ar", "ru"):
        text = "\n".join(sentence.replace(" ", "") for sentence in SENTENCES[language])
        assert "mean_word_max" in (gopher.violated(text, GopherRules()) or ()), language


def test_missing_end_mark_fails_in_languages_that_use_one() -> None:
    rules = C4Rules(failing_lines_max=0, sentences_min=None)
    for language, sentences in SENTENCES.items():
        expected = [] if language == "th" else ["terminal_punctuation"]
        assert c4.violated(sentences[1].rstrip(".。।"), rules) == expected
        assert c4.violated(sentences[1], rules) == []


def test_sentences_are_counted_in_each_language() -> None:
    for language, sentences in SENTENCES.items():
        line = ("" if language in ("zh", "ja") else " ").join(sentences[i] for i in (0, 3, 6))
        # Thai has no end mark: sentences are counted by spaces, and the third one contains a space.
        assert c4.count_sentences([line]) == (3 if language != "th" else 4), language


# Limits.


def test_explicit_limit_applies_to_all_languages_and_null_disables_it() -> None:
    rules = GopherRules(mean_word_max=4.5, stop_words_min=None, top_2gram_max=0.5)
    for script, language in (("Latin", "en"), ("Han", "zh"), ("Devanagari", "hi"), ("Cherokee", "")):
        resolved = limits(rules, script, language)
        assert (resolved["mean_word_max"], resolved["stop_words_min"], resolved["top_2gram_max"]) == (4.5, None, 0.5)


def test_unknown_script_has_no_word_limits() -> None:
    resolved = limits(GopherRules(), "Cherokee", "")
    assert (resolved["mean_word_min"], resolved["mean_word_max"], resolved["stop_words_min"]) == (None, None, None)
    assert resolved["duplicate_5grams_max"] == ENGLISH["duplicate_5grams_max"]


def test_every_language_has_enough_stop_words_for_the_largest_limit() -> None:
    languages = {language for by_script in LANGUAGES.values() for language in by_script}
    assert languages | {"en"} == set(STOP_WORDS)
    assert [language for language, stop_words in STOP_WORDS.items() if len(stop_words) < 8] == []


def test_english_without_stop_words_is_not_mistaken_for_another_language() -> None:
    response = "In this case, see the man page on how a word is split; no one may care by then."
    rules = GopherRules(words_min=None)
    assert gopher.violated(response, rules) == ["stop_words_min"]


# Duplicates and contamination.


def test_hindi_rows_that_differ_in_vowel_signs_are_no_near_duplicates(tmp_path: Path) -> None:
    # Letters without vowel signs: the same in both.
    rows = [text_row("कमल दिन बल मल फल"), text_row("कमाल दीन बाल माल फूल"), text_row("कमल, दिन, बल, मल, फल!")]
    scorer = NearDuplicatesScorer(NearDuplicates.model_validate({"near_duplicates": {"ngram": 2}}), 1000)
    assert score_corpus(scorer, rows, tmp_path)["score"] == [0, 0, 1]


@pytest.mark.parametrize("language", ["hi", "th", "zh"])
def test_only_near_duplicates_are_found_in_each_language(language: str, tmp_path: Path) -> None:
    sentences = list(SENTENCES[language])
    end = "" if language == "zh" else " "
    rows = [text_row(end.join(sentences)), text_row(end.join(sentences[:-1])), text_row(end.join(sentences[5:]))]
    scorer = NearDuplicatesScorer(NearDuplicates.model_validate({"near_duplicates": {"threshold": 0.7}}), 1000)
    first, second, third = score_corpus(scorer, rows, tmp_path)["score"]
    assert (first, third) == (0, 0)
    assert second > 0.7


@pytest.mark.parametrize("language", ["hi", "th", "zh", "ar"])
def test_contamination_is_found_in_each_language(language: str, tmp_path: Path) -> None:
    test, *others = SENTENCES[language]
    write_rows([text_row(test)], tmp_path / "test")
    spec = Contamination.model_validate({"contamination": {"sets": ("test",), "ngram": 8}})
    scorer = ContaminationScorer(spec, {"test": tmp_path / "test"})
    copied, clean = scorer([text_row(f"{others[0]} {test}"), text_row(" ".join(others[:3]))])["score"]
    assert copied > 0
    assert clean == 0


# Language.


@pytest.mark.parametrize(
    ("language", "text", "other"),
    [
        ("zh", "我哋今日去公園行吓啦，天氣好好。", "yue"),
        ("zh", "该函数返回目录中所有文件的列表。", "zh"),
        ("no", "Eg veit ikkje kva du meiner med det, men me kan sjå på det i morgon.", "nn"),
        ("ar", "انا عايز اروح البيت دلوقتي", "ar"),
        ("ms", "Saya suka membaca buku di perpustakaan.", "id"),
        ("hbs", "Ovo je dobra knjiga o programiranju.", "bs"),
    ],
)
def test_macrolanguage_has_the_probability_of_all_its_members(language: str, text: str, other: str) -> None:
    row = response_row(text)
    columns = LanguageScorer(Language(language=language), {})([row])
    assert columns["detected"] == [other]
    assert 0.85 < columns["score"][0] <= 1
    member_scores = [
        LanguageScorer(Language.model_construct(language=member), {})([row])["score"][0]
        for member in MACROLANGUAGES[language]
        if member not in MACROLANGUAGES
    ]
    assert max(member_scores) < columns["score"][0]


def test_member_language_counts_only_itself() -> None:
    row = response_row("该函数返回目录中所有文件的列表。")
    for member in ("yue", "wuu", "hr", "id", "nn"):
        assert LanguageScorer(Language(language=member), {})([row])["score"][0] < 0.3


def test_members_are_languages_of_the_detector() -> None:
    assert {member for members in MACROLANGUAGES.values() for member in members} <= set(DETECTED)


@pytest.mark.parametrize(
    ("language", "suggestion"),
    [
        ("zh-CN", "`zh`?"),
        ("EN", "`en`?"),
        ("en_US", "`en`?"),
        ("english", "`en`?"),
        ("deu", "`de`?"),
        ("cmn", "`zh`?"),
        ("sh", "`hbs`?"),
        ("wuuu", "`wuu`"),
    ],
)
def test_unknown_language_is_rejected_with_a_suggestion(language: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match="not a known ISO 639 code") as caught:
        Language(language=language)
    assert f"did you mean {suggestion}" in str(caught.value)


def test_responses_are_detected_as_their_language() -> None:
    rng = random.Random(3)
    for language in SENTENCES:
        rows = [response_row(rng.choice(responses(language, 100))) for _ in range(4)]
        assert min(LanguageScorer(Language(language=language), {})(rows)["score"]) > 0.9

"""Words of texts in many languages: their number, and which texts have the same words."""

from __future__ import annotations

import math
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scorer_rows import response_row

from tunery.scoring.scorers.length import LengthScorer
from tunery.scoring.scorers.texts import has_words, script, terms, words
from tunery.spec import Length

SENTENCES = [
    # language, sentence, words
    ("English", "Don't re-read the user's file (twice).", 6),
    ("English", "x = f(a, b)  # 3.14", 6),
    ("German", "Der Straßenbahnfahrer fährt über die Brücke.", 6),
    ("Vietnamese", "Tôi thích đọc sách ở thư viện.", 7),
    ("Russian", "Я люблю читать книги в библиотеке.", 6),
    ("Greek", "Μου αρέσει να διαβάζω βιβλία.", 5),
    ("Arabic", "أُحِبُّ قِرَاءَةَ الْكُتُبِ.", 3),
    ("Persian", "من کتاب می\u200cخوانم.", 3),
    ("Hebrew", "אֲנִי אוֹהֵב לִקְרֹא.", 3),
    ("Hindi", "मैं हिन्दी में किताबें पढ़ता हूँ।", 6),
    ("Bengali", "আমি বই পড়তে ভালোবাসি।", 4),
    ("Tamil", "நான் புத்தகம் படிக்கிறேன்.", 3),
    ("Korean", "저는 책을 읽는 것을 좋아합니다.", 5),
    ("Chinese", "我喜欢读书。", 5),
    ("Chinese", "用Python 3.12读取（CSV）文件，然后……返回！", 12),
    ("Japanese", "私はコーヒーが好きです。", 11),
    ("Thai", "ฉันชอบอ่านหนังสือ", 4),
    ("Thai", "ฉันใช้ Python (ทุกวัน)", 5),
    ("Lao", "ຂ້ອຍມັກອ່ານປຶ້ມ", 4),
    ("Khmer", "ខ្ញុំចូលចិត្តអានសៀវភៅ។", 4),
    ("Burmese", "ကျွန်တော်စာအုပ်ဖတ်တယ်။", 4),
    ("Tibetan", "བོད་སྐད་ལེགས་པོ།", 4),
    ("Amharic", "ሰላም፡ለዓለም፡ሁሉ።", 3),
    ("emoji", "👩‍👩‍👧‍👦 ❤️", 2),
]


@pytest.mark.parametrize(("language", "sentence", "count"), SENTENCES)
def test_number_of_words_by_language(language: str, sentence: str, count: int) -> None:
    assert len(words(sentence)) == count
    assert LengthScorer(Length(length="words"), {})([response_row(sentence)])["score"] == [count]


@pytest.mark.parametrize(("language", "sentence", "count"), SENTENCES)
def test_words_preserve_all_characters_in_order(language: str, sentence: str, count: int) -> None:
    assert "".join(words(sentence)) == "".join(sentence.split())


def test_punctuation_is_not_a_word_in_scripts_without_spaces() -> None:
    assert words("“你好”，（世界）！") == ["“你", "好”，（", "世", "界）！"]
    assert terms("“你好”，（世界）！") == ["你", "好", "世", "界"]
    assert terms("ฉัน, 'ชอบ'!") == ["ฉัน", "ชอบ"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("कमल", "कमाल"),  # lotus, wonder: they differ in a vowel sign
        ("दिन", "दीन"),
        ("கல்", "கால்"),
        ("เสือ", "เสื้อ"),  # tiger, shirt: they differ in a tone mark
        ("עַם", "עִם"),
    ],
)
def test_words_that_differ_in_a_combining_mark_are_different(one: str, other: str) -> None:
    assert terms(one) != terms(other)
    assert len(terms(one)) == len(terms(other)) == 1


def test_composed_and_decomposed_text_has_the_same_terms() -> None:
    for text in ("Café Über naïve", "각하 한국어", "プログラム"):
        composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert composed != decomposed
        assert terms(composed) == terms(decomposed)
    assert terms("\u0958लम") == terms("\u0915\u093cलम")


def test_terms_of_english_are_runs_of_letters_digits_and_underscores_in_lower_case() -> None:
    assert terms("Don't re-read `my_file.txt`, x²!") == ["don", "t", "re", "read", "my_file", "txt", "x²"]
    assert terms("He said “naïve”…") == ["he", "said", "naïve"]


def test_dictionary_segmentation_is_unchanged() -> None:
    # If this fails after an update of icu4py, increase the versions of length, gopher, c4, contamination and
    # near_duplicates in the registry of scorers.
    assert words("ฟังก์ชันนี้เปิดไฟล์และคืนค่ารายการของทุกบรรทัด") == (
        ["ฟังก์ชัน", "นี้", "เปิด", "ไฟล์", "และ", "คืน", "ค่า", "รายการ", "ของ", "ทุก", "บรรทัด"]
    )


@given(st.text())
def test_words_subdivide_white_space_separated_text(text: str) -> None:
    assert "".join(words(text)) == "".join(text.split())
    assert all(words(text))
    assert len(words(text)) >= len(text.split())
    assert "" not in terms(text)


@given(st.text(), st.integers(1, 6))
def test_early_stopping_count_agrees_with_full_count(text: str, count: int) -> None:
    assert has_words(text, count) == (len(words(text)) >= count)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("plain", "Latin"),
        ("Größe", "Latin"),
        ("读取文件", "Han"),
        ("ファイルを読む", "Kana"),
        ("読み込み", "Kana"),
        ("파일", "Hangul"),
        ("यह", "Devanagari"),
        ("Вызовите open() для чтения", "Cyrillic"),
        ("调用 os.path.join(a, b) 即可拼接路径", "Han"),  # code is Latin in every language
        ("The sign 的 is the most frequent one of them all", "Latin"),
        ("1 + 1 = 2", "Latin"),
        ("½ — …", ""),
    ],
)
def test_script_is_that_of_most_letters(text: str, name: str) -> None:
    assert script(text) == name


def test_length_of_an_empty_response_is_zero_in_every_unit() -> None:
    for unit in ("words", "chars", "lines"):
        scores = LengthScorer(Length.model_validate({"length": unit}), {})([response_row("")])["score"]
        assert scores == [0]
        assert not math.isnan(scores[0])


@pytest.mark.parametrize("text", ["ก", "ตากลม", "中", "中，", "คั" * 3, "\u0315\u0300", "e\u0301", "，", "ཀ་", "ሀ፡"])
def test_two_hundred_thousand_characters_take_linear_time(text: str) -> None:
    long = text * (200_000 // len(text)) + "é"
    started = time.process_time()
    for function in (words, terms, script):
        function(long)
    assert time.process_time() - started < 4

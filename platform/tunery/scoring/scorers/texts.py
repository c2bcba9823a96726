"""The part of a row that scorers read, and its words. All in time linear in the text's length.

There is one definition of a word, in two forms. `words` keeps punctuation on its word and is what is counted; `terms`
drops punctuation and case and is what is compared. In both:

- Words are separated by white space, and a combining mark stays with its base (UAX #29, rule WB4), as vowel signs in
  Hindi do.
- Chinese and Japanese have no spaces between words: each Han, Hiragana and Katakana character is one word. Korean has
  spaces.
- Thai, Lao, Khmer and Burmese have none either: ICU's dictionaries find their words.
- Tibetan puts a mark (tsheg) after each syllable: each syllable is one word. Older Ethiopic texts put
  another one after each word. Each character of Yi is a syllable, and a word here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Literal

from icu4py.breakers import WordBreaker

from tunery.store.rows import Row, nfc

Part = Literal["answer", "question", "whole"]


def _characters(categories: str, *blocks: tuple[int, int]) -> str:
    """The characters of some ranges (both ends included) that are of some general categories, for use in a set."""
    codes = chain.from_iterable(range(first, last + 1) for first, last in blocks)
    return "".join(map(re.escape, (char for char in map(chr, codes) if unicodedata.category(char)[0] in categories)))


_SINGLE = (
    _characters("LN", (0x3005, 0x3029), (0x3031, 0x303C), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D))
    + "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48c\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
"""Han, Hiragana, Katakana and Yi: each character is a word."""
_DICTIONARY = _characters(
    "LN", (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)
)
"""Thai, Lao, Burmese and Khmer, and the languages that are written in their scripts."""
_TIBETAN = _characters("LN", (0x0F00, 0x0FFF))
_UNSPACED = _SINGLE + _DICTIONARY + _TIBETAN
_EXTEND = (
    _characters("M", (0x0300, 0xFFFF), (0x11100, 0x1114F), (0x1E900, 0x1E95F))
    + "\u00ad\u061c\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0100-\U000e01ef"
)
"""What does not end a word (UAX #29, WB4): combining marks, joiners, and format characters such as the soft hyphen. The
zero width space does: it is what separates words in Khmer. Of the marks beyond U+FFFF only those of Chakma and Adlam:
re tries them one after the other."""

_ETHIOPIC_SPACE = "\u1361"
_MAY_HAVE_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3005-\U0010ffff]")
"""Several times as fast as the exact set, and finds nothing in most texts."""
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_HAS_EXTEND = re.compile(f"[{_EXTEND}]")
_MANY_MARKS = re.compile(f"[{_EXTEND}]{{31}}")
"""More than text in any language has (UAX #15, stream-safe text format)."""
_RUN = rf"([{_DICTIONARY}][{_DICTIONARY}{_EXTEND}]*)|[{_SINGLE}][{_EXTEND}]*|[{_TIBETAN}][{_TIBETAN}{_EXTEND}]*"
"""One word, or, as the first group, the words that a dictionary is to find."""
_PIECE = re.compile(rf"([^\w{_EXTEND}]*)(?:{_RUN}|[^{_UNSPACED}]+)([^\w{_EXTEND}]*)")
"""Of text without white space: punctuation, `_RUN` or a word in a script with spaces, punctuation."""
_TERM = re.compile(rf"{_RUN}|[^\W{_UNSPACED}](?:[{_EXTEND}]|[^\W{_UNSPACED}])*")
_PLAIN_TERM = re.compile(r"\w+")

SAMPLE = 2_000
"""Characters from the beginning of a text by which its script is decided."""
LATIN_WEIGHT = 0.25
"""Of a Latin letter beside one of another script: code, names and units are Latin in texts of every language."""
LONGEST = 2_000_000
"""Characters of a row that are looked at where its words are compared: bounds the memory that one row can take, at some
500 MB. The longest page that Gopher's rules let through has a third of them."""


def select_text(row: Row, of: Part) -> str | None:
    """The text, or None where the row has no such part: a prompt has no answer, a plain text no question.

    A conversation's turns are joined by a blank line. Rejected answers are not looked at.
    """
    turns = row.get("messages")
    if not turns:
        text: str | None = row.get("text")
        return None if of == "question" else text
    if of == "answer":
        return turns[-1]["content"] or "" if turns[-1]["role"] == "assistant" else None
    return "\n\n".join(turn["content"] or "" for turn in turns if of == "whole" or turn["role"] == "user")


def words(text: str) -> list[str]:
    """The text's words as they stand, with the punctuation around them: what lengths are counted in.

    Text in scripts with spaces is cut at white space alone, so a symbol with spaces around it is a word.
    """
    text = text.replace(_ETHIOPIC_SPACE, f"{_ETHIOPIC_SPACE} ")
    if not _unspaced(text):
        return text.split()
    return [word for piece in text.split() for word in _cut(piece)]


def has_words(text: str, count: int) -> bool:
    """Whether there are at least `count` words. Counting stops there where it can: a line may be a whole book."""
    spaced = text.isascii() or not (_ETHIOPIC_SPACE in text or _unspaced(text))
    return len(text.split(None, count) if spaced else words(text)) >= count


def terms(text: str) -> list[str]:
    """The text's words in lower case and Unicode NFC, without punctuation and symbols: what texts are compared by.

    Finer than UAX #29 in one thing: an apostrophe, a period or a comma ends a term even between letters or digits, so
    that texts that differ in such marks share most terms. Underscores are letters.
    """
    lowered = text.lower()
    if lowered.isascii():
        return _PLAIN_TERM.findall(lowered)
    # Normalizing takes quadratic time in a run of combining marks; `composed` does not, and is ten times as slow.
    lowered = nfc(lowered) if _MANY_MARKS.search(lowered) else unicodedata.normalize("NFC", lowered)
    if not (_HAS_EXTEND.search(lowered) or _unspaced(lowered)):
        return _PLAIN_TERM.findall(lowered)
    found: list[str] = []
    for match in _TERM.finditer(lowered):
        if match[1]:
            found += WordBreaker(match[1], "root")
        else:
            found.append(match[0])
    return found


def _unspaced(text: str) -> bool:
    """Whether a script without spaces between words occurs."""
    return not text.isascii() and bool(_MAY_HAVE_UNSPACED.search(text) and _HAS_UNSPACED.search(text))


def _cut(piece: str) -> Iterator[str]:
    """The words of text without white space."""
    for match in _PIECE.finditer(piece):
        before, run, after = match.groups()
        if run:
            found = list(WordBreaker(run, "root"))
            found[0] = before + found[0]
            found[-1] += after
            yield from found
        else:
            yield match[0]


def script(text: str) -> str:
    """The script of most letters among the first SAMPLE characters, as the names of its letters in Unicode begin
    (Latin, Devanagari, Thai), Han for CJK ideographs; "" where there is no letter.

    Japanese, which mixes scripts, is "Kana" from one character in ten on.
    """
    sample = text[:SAMPLE]
    if sample.isascii():
        return "Latin"
    counts: Counter[str] = Counter()
    for character, count in Counter(sample).items():
        counts[_script_of(character)] += count
    weights = {name: float(count) for name, count in counts.items() if name}
    if "Latin" in weights:
        weights["Latin"] *= LATIN_WEIGHT
    if "Kana" in weights and weights["Kana"] * 10 >= weights["Kana"] + weights.get("Han", 0):
        weights["Kana"] += weights.pop("Han", 0)
    return max(weights, key=weights.__getitem__, default="")


@lru_cache(maxsize=1 << 16)
def _script_of(character: str) -> str:
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").partition(" ")[0].title()
    return {"Cjk": "Han", "Hiragana": "Kana", "Katakana": "Kana"}.get(name, name)


def lines(text: str) -> list[str]:
    """Those that are not blank, without the white space around them."""
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def normalize(text: str) -> str:
    """Without differences of case, of composed and decomposed characters, and of white space."""
    return nfc(" ".join(text.casefold().split()))

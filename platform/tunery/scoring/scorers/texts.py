"""Text extraction and word segmentation for scorers, in time linear in the length of the text.

There are two segmentations. `words` keeps punctuation attached and is used for counting; `terms` drops punctuation and
case and is used for comparison. In both:

- Words are separated by white space, and a combining mark stays with its base character (UAX #29, rule WB4), such as
  vowel signs in Hindi.
- Chinese and Japanese have no spaces between words: each Han, Hiragana and Katakana character is one word. Korean has
  spaces.
- Thai, Lao, Khmer and Burmese have no spaces either; their words are found with the dictionaries of ICU.
- Tibetan puts a mark (tsheg) after each syllable, and each syllable is one word. Older Ethiopic texts have a mark after
  each word. Each character of Yi is a syllable and counts as one word.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

from icu4py.breakers import WordBreaker

from tunery.spec.scorers.scorer_entry import RowPart
from tunery.store.rows import Row, nfc


def _characters(categories: str, *blocks: tuple[int, int]) -> str:
    """Return the characters of the inclusive ranges with one of the general categories, escaped for a regex set."""
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
"""Thai, Lao, Burmese and Khmer, and other languages written in their scripts."""
_TIBETAN = _characters("LN", (0x0F00, 0x0FFF))
_UNSPACED = _SINGLE + _DICTIONARY + _TIBETAN
_EXTEND = (
    _characters("M", (0x0300, 0xFFFF), (0x11100, 0x1114F), (0x1E900, 0x1E95F))
    + "\u00ad\u061c\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0100-\U000e01ef"
)
"""Characters that do not end a word (UAX #29, WB4): combining marks, joiners, and format characters such as the soft
hyphen. The zero width space does end a word; it separates words in Khmer. Of the marks beyond U+FFFF, only those of
Chakma and Adlam are included, because re tests them one after the other."""

_ETHIOPIC_SPACE = "\u1361"
_MAY_HAVE_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3005-\U0010ffff]")
"""A superset of _HAS_UNSPACED that is several times as fast and has no match in most texts."""
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_HAS_EXTEND = re.compile(f"[{_EXTEND}]")
_MANY_MARKS = re.compile(f"[{_EXTEND}]{{31}}")
"""More marks than text in any language has (UAX #15, stream-safe text format)."""
_RUN = rf"([{_DICTIONARY}][{_DICTIONARY}{_EXTEND}]*)|[{_SINGLE}][{_EXTEND}]*|[{_TIBETAN}][{_TIBETAN}{_EXTEND}]*"
"""One word, or in the first group a run of words to be split with a dictionary."""
_PIECE = re.compile(rf"([^\w{_EXTEND}]*)(?:{_RUN}|[^{_UNSPACED}]+)([^\w{_EXTEND}]*)")
"""In text without white space: punctuation, `_RUN` or a word in a script with spaces, punctuation."""
_TERM = re.compile(rf"{_RUN}|[^\W{_UNSPACED}](?:[{_EXTEND}]|[^\W{_UNSPACED}])*")
_PLAIN_TERM = re.compile(r"\w+")

SCRIPT_SAMPLE_CHARS = 2_000
"""Number of leading characters from which the script of a text is determined."""
LATIN_WEIGHT = 0.25
"""Weight of a Latin letter relative to one of another script: texts in every language contain Latin code, names and
units."""
MAX_CHARS = 2_000_000
"""Maximum number of characters of a row that are compared, which bounds the memory of one row at about 500 MB. The
longest page that Gopher's rules accept has a third of it."""


def select_text(row: Row, of: RowPart) -> str | None:
    """Return the text of a part of the row, or None if the row has no such part: a prompt has no response, a plain
    text no prompt.

    The messages of a conversation are joined by a blank line. Rejected responses are not included.
    """
    messages = row.get("messages")
    if not messages:
        text: str | None = row.get("text")
        return None if of == "prompt" else text
    if of == "response":
        return messages[-1]["content"] or "" if messages[-1]["role"] == "assistant" else None
    return "\n\n".join(message["content"] or "" for message in messages if of == "all" or message["role"] == "user")


def words(text: str) -> list[str]:
    """Return the words of the text with the punctuation around them; used for lengths.

    Text in scripts with spaces is split at white space only, so a symbol between spaces is a word.
    """
    text = text.replace(_ETHIOPIC_SPACE, f"{_ETHIOPIC_SPACE} ")
    if not _unspaced(text):
        return text.split()
    return [word for chunk in text.split() for word in _split_unspaced(chunk)]


def has_words(text: str, count: int) -> bool:
    """Return whether there are at least `count` words; counting stops early if possible, because a line may be long."""
    spaced = text.isascii() or not (_ETHIOPIC_SPACE in text or _unspaced(text))
    return len(text.split(None, count) if spaced else words(text)) >= count


def terms(text: str) -> list[str]:
    """Return the words of the text in lower case and NFC, without punctuation and symbols; used for comparison.

    Unlike in UAX #29, an apostrophe, period or comma between letters or digits also ends a term, so that texts that
    differ in such marks share most terms. Underscores are letters.
    """
    lowered = text.lower()
    if lowered.isascii():
        return _PLAIN_TERM.findall(lowered)
    # unicodedata.normalize takes quadratic time on a run of combining marks; `nfc` does not, but is ten times as slow.
    lowered = nfc(lowered) if _MANY_MARKS.search(lowered) else unicodedata.normalize("NFC", lowered)
    if not (_HAS_EXTEND.search(lowered) or _unspaced(lowered)):
        return _PLAIN_TERM.findall(lowered)
    result: list[str] = []
    for match in _TERM.finditer(lowered):
        if match[1]:
            result += WordBreaker(match[1], "root")
        else:
            result.append(match[0])
    return result


def _unspaced(text: str) -> bool:
    """Return whether the text contains a script without spaces between words."""
    return not text.isascii() and bool(_MAY_HAVE_UNSPACED.search(text) and _HAS_UNSPACED.search(text))


def _split_unspaced(chunk: str) -> Iterator[str]:
    """Yield the words of text without white space."""
    for match in _PIECE.finditer(chunk):
        before, run, after = match.groups()
        if run:
            run_words = list(WordBreaker(run, "root"))
            run_words[0] = before + run_words[0]
            run_words[-1] += after
            yield from run_words
        else:
            yield match[0]


def script(text: str) -> str:
    """Return the script of most letters among the first SCRIPT_SAMPLE_CHARS characters, or "" without letters.

    It is the first word of the Unicode names of its letters (Latin, Devanagari, Thai), or Han for CJK ideographs.
    Japanese, which mixes scripts, is "Kana" if at least one character in ten is Hiragana or Katakana.
    """
    sample = text[:SCRIPT_SAMPLE_CHARS]
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
    """Return the non-blank lines, stripped."""
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def normalize(text: str) -> str:
    """Normalize case, Unicode composition and white space."""
    return nfc(" ".join(text.casefold().split()))

"""What of a row the scorers look at, and the words in it. All in time linear in the text's length."""

from __future__ import annotations

import re
from typing import Literal

from tunery.store.rows import Row, composed

Part = Literal["answer", "question", "whole"]

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u9fff"  # Han
    "\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Scripts that put no spaces between words: each of their characters counts as a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

LONGEST = 2_000_000
"""Characters of a row that are looked at where its words are compared: bounds the memory that one row can take, at some
500 MB. The longest page that Gopher's rules let through has a third of them."""


def part(row: Row, of: Part) -> str | None:
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
    """Runs of letters, digits and underscores, in lower case; without punctuation, and so without emoji."""
    return _WORD.findall(text.lower())


def lines(text: str) -> list[str]:
    """Those that are not blank, without the white space around them."""
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def normal(text: str) -> str:
    """Without differences of case, of composed and decomposed characters, and of white space."""
    return composed(" ".join(text.casefold().split()))

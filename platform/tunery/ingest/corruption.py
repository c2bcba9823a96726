"""Damage a known share of the rows, to see whether a method finds them.

Scores of data quality are usually judged by what training on their choice achieves, a long way round. With
planted damage the truth is known: the column `planted` says which rows were damaged and how.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

KINDS = ("shuffled", "swapped", "cut", "repeated")
"""What can befall a row: shuffled words, another row's answer, an end in mid-word, a phrase over and over."""

Damage = Callable[[int, Sequence[str], bool, random.Random], str | None]
"""From a row's index, the contents of all rows, whether the row is a plain text and a random source to the
damaged content, or None where the row is too short for it. The content is the text or the assistant's answer.
"""

MIN_WORDS = 4
"""Fewer words in another order may still be a sentence."""

PHRASE_WORDS = (3, 8)
"""How long a repeated phrase is: what a language model that got stuck repeats."""


def corrupt(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows in their order, `round(share * len(rows))` of them damaged, with a new key `planted` in all.

    A row has `text` or `messages`, whose last one is the answer that gets damaged. `planted` is the kind of
    damage, one of KINDS, or "" where the row is intact. The kinds get equal shares as far as the rows are
    long enough for them. The given rows stay as they are; equal arguments give equal results.

    Raises ValueError when the share is not in [0, 1], when a row has no content or has `planted` already (a
    second round would forget the damage of the first), and when too few rows can be damaged at all.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: it is the part of the rows to damage, so choose it between 0 and 1.")
    contents = [_content(index, row) for index, row in enumerate(rows)]
    wanted = round(share * len(rows))
    rng = random.Random(seed)
    planted: dict[int, tuple[str, str]] = {}
    used: Counter[str] = Counter()
    # Ties between kinds fall to this order; a fixed one would favour its first kind where few are damaged.
    order = rng.sample(KINDS, len(KINDS))
    for index in rng.sample(range(len(rows)), len(rows)):
        if len(planted) == wanted:
            break
        # The kind used least goes first: equal shares where all fit, and the nearest to them elsewhere.
        for kind in sorted(order, key=lambda kind: used[kind]):
            damaged = _DAMAGES[kind](index, contents, "text" in rows[index], rng)
            if damaged is not None:
                planted[index] = kind, damaged
                used[kind] += 1
                break
    if len(planted) < wanted:
        raise ValueError(
            f"only {len(planted)} of {len(rows)} rows can be damaged, and share {share} asks for {wanted}: "
            "the others are empty. Leave empty rows out, or lower the share."
        )
    return [_with_content(row, *planted.get(index, ("", ""))) for index, row in enumerate(rows)]


def _content(index: int, row: Row) -> str:
    if "planted" in row:
        raise ValueError(f"row {index} has the key 'planted' already: damage the original rows, not damaged ones.")
    if "text" in row:
        content = row["text"]
    elif row.get("messages"):
        content = row["messages"][-1].get("content")
    else:
        raise ValueError(f"row {index} has neither 'text' nor 'messages', but {sorted(row)}.")
    if not isinstance(content, str):
        raise ValueError(f"row {index} holds {type(content).__name__} where a string is expected: {content!r:.80}")
    return content


def _with_content(row: Row, kind: str, content: str) -> Row:
    """A copy of the row with other content, or with its own where the kind is ""."""
    if not kind:
        return {**row, "planted": ""}
    if "text" in row:
        return {**row, "text": content, "planted": kind}
    *before, answer = row["messages"]
    return {**row, "messages": [*before, {**answer, "content": content}], "planted": kind}


def _shuffled(index: int, contents: Sequence[str], _is_text: bool, rng: random.Random) -> str | None:
    """The words change places; the spaces and line ends between them stay: the layout tells nothing."""
    pieces = re.split(r"(\s+)", contents[index])
    words = [piece for piece in pieces[::2] if piece]
    if len(words) < MIN_WORDS or len(set(words)) == 1:
        return None
    mixed = rng.sample(words, len(words))
    if mixed == words:
        mixed = words[1:] + words[:1]
    replacements = iter(mixed)
    return "".join(next(replacements) if place % 2 == 0 and piece else piece for place, piece in enumerate(pieces))


def _swapped(index: int, contents: Sequence[str], is_text: bool, rng: random.Random) -> str | None:
    """Another row's answer, or the first half of a text and the second half of another row's."""
    own = contents[index]
    first = _halves(own)[0] if is_text else ""
    if is_text and not first:
        return None
    start = rng.randrange(len(contents))
    for other in (*range(start, len(contents)), *range(start)):
        second = _halves(contents[other])[1] if is_text else contents[other]
        # Rows may repeat one another; their own words from another row would be no damage.
        if second.strip() and (first + second).split() != own.split():
            return first + second
    return None


def _halves(text: str) -> tuple[str, str]:
    """A text cut before the word nearest to its middle; the first half is "" where there is a single word."""
    starts = [match.end() for match in re.finditer(r"\S\s+(?=\S)", text)]
    middle = min(starts, key=lambda start: abs(start - len(text) / 2), default=0)
    return text[:middle], text[middle:]


def _cut(index: int, contents: Sequence[str], _is_text: bool, rng: random.Random) -> str | None:
    """The beginning, 20 to 60% of it, up to the middle of a word."""
    text = contents[index]
    ends = range(-(-len(text) // 5), len(text) * 3 // 5 + 1)
    within_words = [end for end in ends if text[end - 1 : end + 1].isalnum() and 0 < end < len(text)]
    return text[: rng.choice(within_words)] if within_words else None


def _repeated(index: int, contents: Sequence[str], _is_text: bool, rng: random.Random) -> str | None:
    """A phrase of the content, repeated up to about the original's length, and three times at the least."""
    words = contents[index].split()
    if not words:
        return None
    length = min(rng.randint(*PHRASE_WORDS), len(words))
    start = rng.randrange(len(words) - length + 1)
    phrase = " ".join(words[start : start + length])
    times = max(3, -(-len(contents[index]) // (len(phrase) + 1)))
    repeated = " ".join([phrase] * times)
    # Content that repeats itself already gets one more.
    return repeated if repeated.split() != words else f"{repeated} {phrase}"


_DAMAGES: dict[str, Damage] = {"shuffled": _shuffled, "swapped": _swapped, "cut": _cut, "repeated": _repeated}

"""Injects corruption into a fraction of the rows, to measure how well a method detects it.

Data quality scores are usually evaluated by training on the data they select, which is indirect. With injected
corruption the ground truth is known: the column `injected_corruption` says which rows were corrupted and how.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

KINDS = ("shuffled", "swapped", "cut", "repeated")
"""Kinds of corruption: shuffled words, the response of another row, truncation in the middle of a word, a repeated
phrase."""

Corruption = Callable[[int, Sequence[str], bool, random.Random], str | None]
"""(row index, contents of all rows, whether the row is a plain text, random generator) -> corrupted content, or None if
the row is too short for it. The content is the text or the last message.
"""

MIN_WORDS = 4
"""With fewer words, another order may still be a valid sentence."""

PHRASE_WORDS = (3, 8)
"""Range of the number of words of a repeated phrase, as in the degenerate repetition of language models."""


def corrupt(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Return copies of the rows in order with the new key `injected_corruption`; `round(share * len(rows))` are
    corrupted.

    A row has `text` or `messages`; of messages, the last one is corrupted. `injected_corruption` is one of KINDS, or ""
    for an intact row. Kinds are equally frequent as far as the rows are long enough for them. The result is
    deterministic.

    Raises ValueError if the share is not in [0, 1], if a row has no content or already has the key, or if too few rows
    can be corrupted.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: it is the fraction of rows to corrupt and must be between 0 and 1.")
    contents = [_content(index, row) for index, row in enumerate(rows)]
    num_corrupted = round(share * len(rows))
    rng = random.Random(seed)
    corrupted: dict[int, tuple[str, str]] = {}
    kind_counts: Counter[str] = Counter()
    # Ties between kinds are broken by this random order; a fixed one would favor its first kind in small samples.
    order = rng.sample(KINDS, len(KINDS))
    for index in rng.sample(range(len(rows)), len(rows)):
        if len(corrupted) == num_corrupted:
            break
        # The least frequent kind is tried first, to keep the kinds as equally frequent as possible.
        for kind in sorted(order, key=lambda kind: kind_counts[kind]):
            content = _CORRUPTIONS[kind](index, contents, "text" in rows[index], rng)
            if content is not None:
                corrupted[index] = kind, content
                kind_counts[kind] += 1
                break
    if len(corrupted) < num_corrupted:
        raise ValueError(
            f"only {len(corrupted)} of {len(rows)} rows can be corrupted, but share {share} requires {num_corrupted}: "
            "the others are empty. Remove empty rows, or lower the share."
        )
    return [_with_content(row, *corrupted.get(index, ("", ""))) for index, row in enumerate(rows)]


def _content(index: int, row: Row) -> str:
    if "injected_corruption" in row:
        raise ValueError(
            f"row {index} already has the key 'injected_corruption': corrupt the original rows, not corrupted ones."
        )
    if "text" in row:
        content = row["text"]
    elif row.get("messages"):
        content = row["messages"][-1].get("content")
    else:
        raise ValueError(f"row {index} has neither 'text' nor 'messages', but {sorted(row)}.")
    if not isinstance(content, str):
        raise ValueError(f"row {index} has {type(content).__name__} instead of a string: {content!r:.80}")
    return content


def _with_content(row: Row, kind: str, content: str) -> Row:
    """Return a copy of the row with `injected_corruption`, and with the new content unless the kind is ""."""
    if not kind:
        return {**row, "injected_corruption": ""}
    if "text" in row:
        return {**row, "text": content, "injected_corruption": kind}
    *before, last = row["messages"]
    return {**row, "messages": [*before, {**last, "content": content}], "injected_corruption": kind}


def _shuffled(index: int, contents: Sequence[str], _is_text: bool, rng: random.Random) -> str | None:
    """Shuffle the words and keep the white space between them, so that the layout does not reveal the corruption."""
    tokens = re.split(r"(\s+)", contents[index])
    words = [token for token in tokens[::2] if token]
    if len(words) < MIN_WORDS or len(set(words)) == 1:
        return None
    shuffled = rng.sample(words, len(words))
    if shuffled == words:
        shuffled = words[1:] + words[:1]
    replacements = iter(shuffled)
    return "".join(
        next(replacements) if position % 2 == 0 and token else token for position, token in enumerate(tokens)
    )


def _swapped(index: int, contents: Sequence[str], is_text: bool, rng: random.Random) -> str | None:
    """Return the response of another row, or the first half of the text followed by the second half of another."""
    original = contents[index]
    first = _halves(original)[0] if is_text else ""
    if is_text and not first:
        return None
    start = rng.randrange(len(contents))
    for other in (*range(start, len(contents)), *range(start)):
        second = _halves(contents[other])[1] if is_text else contents[other]
        # Rows may be equal, and the same words from another row would be no corruption.
        if second.strip() and (first + second).split() != original.split():
            return first + second
    return None


def _halves(text: str) -> tuple[str, str]:
    """Split a text before the word nearest to its middle; the first half of a single word is ""."""
    starts = [match.end() for match in re.finditer(r"\S\s+(?=\S)", text)]
    middle = min(starts, key=lambda start: abs(start - len(text) / 2), default=0)
    return text[:middle], text[middle:]


def _cut(index: int, contents: Sequence[str], _is_text: bool, rng: random.Random) -> str | None:
    """Truncate the content to 20 to 60% of its length, in the middle of a word."""
    text = contents[index]
    ends = range(-(-len(text) // 5), len(text) * 3 // 5 + 1)
    within_words = [end for end in ends if text[end - 1 : end + 1].isalnum() and 0 < end < len(text)]
    return text[: rng.choice(within_words)] if within_words else None


def _repeated(index: int, contents: Sequence[str], _is_text: bool, rng: random.Random) -> str | None:
    """Repeat a phrase of the content up to about the original length, and at least three times."""
    words = contents[index].split()
    if not words:
        return None
    length = min(rng.randint(*PHRASE_WORDS), len(words))
    start = rng.randrange(len(words) - length + 1)
    phrase = " ".join(words[start : start + length])
    times = max(3, -(-len(contents[index]) // (len(phrase) + 1)))
    repeated = " ".join([phrase] * times)
    # Content that already is this repetition gets one more, so that it changes.
    return repeated if repeated.split() != words else f"{repeated} {phrase}"


_CORRUPTIONS: dict[str, Corruption] = {"shuffled": _shuffled, "swapped": _swapped, "cut": _cut, "repeated": _repeated}

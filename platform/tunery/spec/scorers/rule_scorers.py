"""Configs and registry entries of the scorers that read the text of a row only: rules, statistics, language."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tunery.spec.references import AUTO, Auto, Config
from tunery.spec.scorers.language_codes import LANGUAGES, MACROLANGUAGES, similar_codes
from tunery.spec.scorers.scorer_entry import ByOption, Count, ResponseOrAll, RowPart, ScorerEntry, ScorerSpec

Share = Annotated[float, Field(ge=0, le=1)]


class Length(ScorerSpec):
    """Length of the response. Meant for a range in `keep`; for `keep_fraction`, longer is better.

    Zhao et al. 2024, "Long Is More for Alignment" (https://arxiv.org/abs/2402.04833): the 1,000 longest responses are a
    strong baseline.
    """

    length: Literal["words", "chars", "lines"]
    """words: separated by white space; in Chinese and Japanese each character, in Thai, Lao, Khmer and Burmese words by
    ICU's dictionaries; chars: Unicode code points; lines: lines that are not blank."""
    of: RowPart = "response"
    """Part that is measured. response: the last message of a conversation; prompt: its user messages; all: all
    its messages."""


class GopherRules(Config):
    """Limits of the rules; `null` switches a rule off. A rule is violated beyond its limit, not at it.

    Words are those of `length: words`. The paper's limits are for web pages in English. `auto` uses them for English,
    and for other languages those of FineWeb-2 (Penedo et al. 2025, https://arxiv.org/abs/2506.20920), by the script of
    the text and its stop words; a number applies to every language. On responses of a few sentences `words_min` and
    `stop_words_min` only detect that they are short, and on code `mean_word_max`, `stop_words_min` and
    `alphabetic_words_min` are meaningless: switch them off there.
    """

    of: ResponseOrAll = "response"
    """Part that is scored. response: the last message of a conversation; all: all its messages."""
    words_min: Count | None = 50
    """Minimum number of words (A1.1)."""
    words_max: Count | None = 100_000
    """Maximum number of words (A1.1)."""
    mean_word_min: Annotated[float, Field(ge=0)] | Auto | None = AUTO
    """Minimum mean length of words in characters (A1.1). auto: 3 in English, 1 to 3 in other scripts, none in unknown
    scripts."""
    mean_word_max: Annotated[float, Field(ge=0)] | Auto | None = AUTO
    """Maximum mean length of words in characters (A1.1). auto: 10 in English, 15 in other languages with Latin letters,
    5 (Chinese) to 37 (Tamil) in other scripts, none in unknown scripts."""
    hashes_max: Annotated[float, Field(ge=0)] | None = 0.1
    """Maximum number of hash signs per word (A1.1)."""
    ellipses_max: Annotated[float, Field(ge=0)] | None = 0.1
    """Maximum number of ellipses per word, as three dots or one character (A1.1)."""
    bullet_lines_max: Share | None = 0.9
    """Maximum share of lines that start with a bullet point (A1.1)."""
    ellipsis_lines_max: Share | None = 0.3
    """Maximum share of lines that end with an ellipsis (A1.1)."""
    alphabetic_words_min: Share | None = 0.8
    """Minimum share of words with at least one letter (A1.1)."""
    stop_words_min: Annotated[int, Field(ge=1, le=8)] | Auto | None = AUTO
    """Minimum number of different stop words, of `the be to of and that have with` or of the text's language, in any
    letter case (A1.1). auto: 2, none in scripts without known stop words."""
    duplicate_lines_max: Share | None = 0.3
    """Maximum share of repeated lines (table A1, as all below)."""
    duplicate_paragraphs_max: Share | None = 0.3
    """Maximum share of repeated paragraphs (separated by blank lines)."""
    duplicate_line_chars_max: Share | None = 0.2
    """Maximum share of characters in repeated lines."""
    duplicate_paragraph_chars_max: Share | None = 0.2
    """Maximum share of characters in repeated paragraphs."""
    top_2gram_max: Share | Auto | None = AUTO
    """Maximum share of the words' characters in occurrences of the most frequent pair of words, if it occurs twice.
    auto: 0.2, 0.18 and 0.16 for n = 2, 3 and 4; in Chinese and Japanese, where a word is one character, 0.26, 0.21 and
    0.18."""
    top_3gram_max: Share | Auto | None = AUTO
    """The same for three words."""
    top_4gram_max: Share | Auto | None = AUTO
    """The same for four words."""
    duplicate_5grams_max: Share | Auto | None = AUTO
    """Maximum share of the words' characters in repeated runs of 5 words; each character counts once. auto: 0.15 for
    n = 5, down to 0.1 for n = 10; in Chinese and Japanese 0.25 down to 0.16."""
    duplicate_6grams_max: Share | Auto | None = AUTO
    """The same for 6 words."""
    duplicate_7grams_max: Share | Auto | None = AUTO
    """The same for 7 words."""
    duplicate_8grams_max: Share | Auto | None = AUTO
    """The same for 8 words."""
    duplicate_9grams_max: Share | Auto | None = AUTO
    """The same for 9 words."""
    duplicate_10grams_max: Share | Auto | None = AUTO
    """The same for 10 words."""


class Gopher(ScorerSpec):
    """Number of MassiveText's quality and repetition rules that a row violates. Lower is better.

    Rae et al. 2021, "Scaling Language Models" (https://arxiv.org/abs/2112.11446), section A1.1 and table A1, drop a
    page for one violation.
    """

    gopher: GopherRules
    """Limits; `{}` for the defaults."""


class C4Rules(Config):
    """Limits of the rules; `null` or `false` switches a rule off.

    The paper removes lines from pages. Rows are kept or dropped as a whole, so a rule on lines is violated if it would
    remove more than `failing_lines_max` of them, and sentences are counted in the remaining lines. Not implemented: the
    list of bad words, citation marks (which the paper removes), repeated spans of three sentences (see `duplicates`)
    and the language (see `language`). On short responses `sentences_min` only detects that they are short; on code,
    `braces` and `terminal_punctuation` detect that it is code.
    """

    of: ResponseOrAll = "response"
    """Part that is scored. response: the last message of a conversation; all: all its messages."""
    failing_lines_max: Share = 0.5
    """Maximum share of failing lines (not in the paper). 0: one failing line is a violation."""
    terminal_punctuation: bool = True
    """A line must end with a period, an exclamation or question mark (also of other scripts) or an end quotation mark.
    Lines in Thai or Lao, which have no end marks, pass (mC4 has no such rule for that reason: Xue et al. 2021,
    https://arxiv.org/abs/2010.11934, section 3.1)."""
    line_words_min: Count | None = 5
    """Minimum number of words of a line, those of `length: words`."""
    javascript: bool = True
    """A line must not mention Javascript."""
    policy: bool = True
    """A line must not mention terms of use, privacy policies or cookies."""
    sentences_min: Count | None = 3
    """Minimum number of sentences in the lines that pass the rules above. In Thai and Lao a space ends a sentence."""
    lorem_ipsum: bool = True
    """The words `lorem ipsum` must not occur."""
    braces: bool = True
    """There must be no curly bracket."""


class C4(ScorerSpec):
    """Number of C4's rules that a row violates. Lower is better.

    Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (https://arxiv.org/abs/1910.10683), section 2.2.
    """

    c4: C4Rules
    """Limits; `{}` for the defaults."""


class Language(ScorerSpec):
    """Probability that the row is in the language, by py3langid. Higher is better.

    Lui & Baldwin 2012, "langid.py" (https://aclanthology.org/P12-3005/). Short texts get low probabilities: 0.9 drops
    30% of the builtin responses, all of them English; 0.1 drops 3%, and each of 70 sentences in 14 other languages. The
    probability of a macrolanguage is the sum over its members: `zh` includes Wu (`wuu`) and Cantonese (`yue`), `no`
    Nynorsk (`nn`), `ar` Egyptian Arabic (`arz`), `ms` Indonesian (`id`). A member's own code is that member only. `hr`,
    `sr` and `bs` are separate languages; `hbs` is all three.
    """

    language: str
    """ISO 639 code: en, de, zh."""
    of: RowPart = "response"
    """Part that is scored. response: the last message of a conversation; prompt: its user messages; all: all
    its messages."""

    @field_validator("language")
    @classmethod
    def _known(cls, language: str) -> str:
        if language not in LANGUAGES and language not in MACROLANGUAGES:
            near = " or ".join(f"`{code}`" for code in similar_codes(language))
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"it is not a known ISO 639 code such as en, de, zh{hint}")
        return language

    @property
    def members(self) -> tuple[str, ...]:
        """Codes of the detector whose probabilities are added."""
        return MACROLANGUAGES.get(self.language, (self.language,))


def _no_settings(_: str) -> dict[str, Any]:
    return {}


RULE_SCORERS = (
    ScorerEntry(
        Length,
        "row",
        "tunery.scoring.scorers.length:LengthScorer",
        direction="maximize",
        version=2,
        by_option=ByOption(str, default="words"),
        default_rule="1..",
    ),
    ScorerEntry(
        Gopher,
        "row",
        "tunery.scoring.scorers.gopher:GopherScorer",
        direction="minimize",
        version=2,
        by_option=ByOption(_no_settings, default="", takes_value=False),
        default_rule="<= 0",  # the paper drops a page for one violation
    ),
    ScorerEntry(
        C4,
        "row",
        "tunery.scoring.scorers.c4:C4Scorer",
        direction="minimize",
        version=2,
        by_option=ByOption(_no_settings, default="", takes_value=False),
        default_rule="<= 0",
    ),
    ScorerEntry(
        Language,
        "row",
        "tunery.scoring.scorers.language:LanguageScorer",
        direction="maximize",
        version=2,
        by_option=ByOption(str, required="an ISO 639 code: `language=en`"),
        default_rule=">= 0.1",  # 0.9 drops a third of English texts
    ),
)

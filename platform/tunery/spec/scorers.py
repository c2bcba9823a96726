"""Configs of the scorers, and the registry `SCORERS` with everything that other packages need to know about a kind.

A scorer is a mapping whose first key is its kind: `{perplexity: base}`. A new scorer: its config and entry here, and
a file in scoring/scorers/ with the interface of its input kind (scoring/scorers/interfaces.py); docs/extending.md has
all steps.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tunery.spec.plugins import KindUnion, Registry
from tunery.spec.references import AUTO, ROWS, Auto, Config, Model, StageRef
from tunery.spec.scorer_entry import ByOption, ClassificationSpec, ModelScorerSpec, ScorerEntry, ScorerSpec
from tunery.spec.yaml_source import plain_scalar

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
ResponseOrAll = Literal["response", "all"]
RowPart = Literal["response", "prompt", "all"]
"""Part of a row that is scored. response: the last message of a conversation; prompt: its user messages; all: all its
messages. For a text, response and all are the text, and there is no prompt. Rejected responses are not scored."""


class Perplexity(ModelScorerSpec):
    """exp of the mean negative log-likelihood of a row's tokens. Lower is better.

    Marion et al. 2023, "When Less is More" (https://arxiv.org/abs/2309.04564).
    """

    perplexity: Model
    """Causal language model."""
    of: ResponseOrAll = "response"
    """response: of the last response given everything before it (of a text, all of it); all: of every token."""


class Ifd(ModelScorerSpec):
    """Instruction-following difficulty: perplexity of the response given the prompt, divided by that without the
    prompt.

    Near 1 and above, the response hardly depends on the prompt; near 0 the response is trivial. Li et al. 2024, "From
    Quantity to Quality" (https://arxiv.org/abs/2308.12032), train on the highest below 1. To filter bad rows, lower is
    better.
    """

    ifd: Model
    """Causal language model."""


class Reward(ClassificationSpec):
    """Output of a reward model: the single logit of its head, unbounded; of a `reward` stage normalised to (logit -
    mean) / standard deviation. Higher is better.

    Stiennon et al. 2020, "Learning to summarize from human feedback" (https://arxiv.org/abs/2009.01325). Any
    sequence-classification model with one label works, regression models too.
    """

    reward: Model
    """A `reward` stage, or a sequence-classification model with one label."""


class Classifier(ClassificationSpec):
    """Probability of one label under a text classifier. Higher is better: set the label of good rows, or `prefer: low`
    in `keep`.

    A softmax over the labels; a sigmoid for each if the model's config has `multi_label_classification`, and for a
    model with one label. As in FineWeb-Edu (Penedo et al. 2024, https://arxiv.org/abs/2406.17557), whose own classifier
    is a regression: use `reward` for that.
    """

    classifier: Model
    """A `classifier` stage, or a sequence-classification model."""
    label: str | Annotated[int, Field(ge=0)]
    """Name or number of the label, as in `id2label` of the model's config.json."""
    temperature: Annotated[float, Field(gt=0)] | Auto = 1.0
    """Divisor of the logits: above 1 probabilities are less extreme, below 1 more (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). With two labels, or a sigmoid, it does not change the order of rows. auto: the
    one that calibrates a `classifier` stage best on its eval_data."""


class Embedding(ModelScorerSpec):
    """Cosine similarity to the most similar row of another stage. Higher is better.

    The embedding is the mean of the model's last hidden states over the row's tokens, as in Reimers & Gurevych 2019,
    "Sentence-BERT" (https://arxiv.org/abs/1908.10084). A row that is also in the other stage has 1. Without another
    stage there is no score, but the vectors are stored for `diverse` in a select stage.
    """

    embedding: Model
    """An encoder, or a causal language model without its head."""
    reference: str | None = None
    """Stage with the reference rows; of more than 2,048 rows a sample of that size by a hash of their ids."""

    @property
    def returns_embeddings(self) -> bool:
        return self.reference is None

    def inputs(self) -> Iterator[StageRef]:
        yield from super().inputs()
        if self.reference is not None:
            yield StageRef(("reference",), self.reference, ROWS)


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


_CODES = """
ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy ga
gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb lg lij
ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn so
sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu
"""
LANGUAGES = tuple(_CODES.split())
"""ISO 639 codes that the detector knows."""
MACROLANGUAGES = {
    "ar": ("ar", "ary", "arz"),  # Moroccan and Egyptian Arabic
    "bik": ("bcl",),
    "ff": ("fuv",),
    "gn": ("gug",),
    "hbs": ("bs", "hr", "sr"),  # Serbo-Croatian: Bosnian, Croatian, Serbian
    "kok": ("gom",),
    "ku": ("ku", "sdh"),
    "lv": ("lv", "ltg"),  # with Latgalian
    "ms": ("ms", "id"),  # with Indonesian
    "nb": ("no",),  # no macrolanguage: the detector's "no" is Bokmål
    "no": ("no", "nn"),  # Bokmål and Nynorsk
    "uz": ("uz", "uzs"),
    "zh": ("zh", "wuu", "yue"),  # with Wu and Cantonese
}
"""Members of the macrolanguages of ISO 639-3 (https://iso639-3.sil.org/about/scope) that the detector knows."""
_OTHER_NAMES = {
    name: code
    for code, names in {
        "ar": "arabic ara arb",
        "de": "german deu ger",
        "en": "english eng",
        "es": "spanish spa",
        "fa": "persian farsi fas",
        "fr": "french fra fre",
        "hbs": "sh serbo-croatian",
        "hi": "hindi hin",
        "id": "indonesian ind in",
        "it": "italian ita",
        "ja": "japanese jpn jp",
        "ko": "korean kor kr",
        "ms": "malay msa",
        "nb": "nob",
        "nn": "nno",
        "no": "norwegian nor",
        "pt": "portuguese por",
        "ru": "russian rus",
        "th": "thai tha",
        "tr": "turkish tur",
        "uk": "ukrainian ukr ua",
        "vi": "vietnamese vie vn",
        "yue": "cantonese",
        "zh": "chinese mandarin zho cmn cn",
    }.items()
    for name in names.split()
}
"""Code by other names and codes of a language."""


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
        known = sorted({*LANGUAGES, *MACROLANGUAGES})
        if language not in known:
            lower = language.lower()
            base = re.split("[-_]", lower)[0]  # zh-CN, en_US
            by_name = [code for code in (_OTHER_NAMES.get(lower), _OTHER_NAMES.get(base), base) if code in known][:1]
            near = by_name or difflib.get_close_matches(lower, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(f'`{code}`' for code in near)}?" if near else ""
            raise ValueError(f"it is not a known ISO 639 code such as en, de, zh{hint}")
        return language

    @property
    def members(self) -> tuple[str, ...]:
        """Codes of the detector whose probabilities are added."""
        return MACROLANGUAGES.get(self.language, (self.language,))


class Duplicates(ScorerSpec):
    """Number of earlier rows with the same content: 0 for the first. Lower is better; keep rows at 0."""

    duplicates: Literal["exact", "normalised"]
    """exact: the content of the row's id (Unicode NFC, without trailing white space); normalised: also ignores case and
    the amount of white space."""
    of: Literal["row", "prompt", "response"] = "row"
    """row: everything, including roles and rejected responses; prompt: the user messages; response: the last
    message."""


class NearDuplicatesSettings(Config):
    """Settings of near-duplicate detection; `{}` for the defaults."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of the n-gram sets from which rows are near duplicates (Lee et al. 2022, 4.2)."""
    ngram: Count = 5
    """Words of an n-gram (Lee et al. 2022, appendix A); a shorter text is one n-gram."""
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Number of hash functions: the standard error of the estimate is at most 0.5 / sqrt(permutations), 0.044 for 128.
    Each takes four bytes per row."""
    of: RowPart = "all"
    """Part that is compared. response: the last message of a conversation; prompt: its user messages; all: all
    its messages."""


class NearDuplicates(ScorerSpec):
    """Similarity to the most similar earlier row, 0 if none reaches the threshold. Lower is better; keep rows at 0.

    MinHash (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900) with LSH, as in Lee et al. 2022, "Deduplicating
    Training Data Makes Language Models Better" (https://arxiv.org/abs/2107.06499).
    """

    near_duplicates: NearDuplicatesSettings
    """Settings; `{}` for the defaults."""


class ContaminationSettings(Config):
    """Settings of contamination detection."""

    sets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Stages with evaluation sets, whose rows must not occur in the scored rows."""
    ngram: Annotated[int, Field(ge=2)] = 13
    """Words of an n-gram (appendix C; the paper uses 8 to 13). A shorter text is one n-gram."""
    of: RowPart = "all"
    """Part that is compared, in the scored rows and in the sets."""

    @field_validator("sets")
    @classmethod
    def _distinct(cls, sets: tuple[str, ...]) -> tuple[str, ...]:
        if repeated := sorted({name for name in sets if sets.count(name) > 1}):
            raise ValueError(f"{', '.join(repeated)} occurs twice")
        return sets


class Contamination(ScorerSpec):
    """Share of the row's n-grams that occur in an evaluation set. Lower is better; keep rows at 0.

    Brown et al. 2020, "Language Models are Few-Shot Learners" (https://arxiv.org/abs/2005.14165), appendix C.
    """

    contamination: ContaminationSettings
    """Evaluation sets and settings."""

    def inputs(self) -> Iterator[StageRef]:
        for index, stage in enumerate(self.contamination.sets):
            yield StageRef(("contamination", "sets", index), stage, ROWS)


def _model_setting(value: str) -> dict[str, str]:
    return {"pretrained": value}


def _no_settings(_: str) -> dict[str, Any]:
    return {}


def _threshold_setting(value: str) -> dict[str, Any]:
    return {"threshold": plain_scalar(value)} if value else {}


def _sets_setting(value: str) -> dict[str, list[str]]:
    return {"sets": [value]}


SCORERS: Registry[ScorerEntry] = Registry(
    "scorers",
    ScorerEntry,
    [
        ScorerEntry(
            Perplexity,
            "likelihood",
            "tunery.scoring.scorers.perplexity:PerplexityScorer",
            direction="minimize",
            version=2,
            by_option=ByOption(_model_setting, required="a model's folder or hub name: `perplexity=./model`"),
            default_rule="best 80%",  # as in experiments/quickstart.yaml
        ),
        ScorerEntry(
            Ifd,
            "likelihood",
            "tunery.scoring.scorers.ifd:IfdScorer",
            direction="minimize",
            version=2,
            by_option=ByOption(_model_setting, required="a model's folder or hub name: `ifd=./model`"),
        ),
        ScorerEntry(
            Reward,
            "classification",
            "tunery.scoring.scorers.reward_score:RewardScorer",
            direction="maximize",
            version=2,
            by_option=ByOption(_model_setting, required="a reward model's folder or hub name: `reward=./model`"),
        ),
        ScorerEntry(
            Classifier,
            "classification",
            "tunery.scoring.scorers.label_probability:ClassifierScorer",
            direction="maximize",
            version=3,
            by_option=ByOption(
                _model_setting,
                required="a classifier's folder or hub name: `classifier=./model`",
                fields={"label": "good"},  # classifiers trained by tunery have the labels bad and good
            ),
            default_rule=">= 0.5",
        ),
        ScorerEntry(
            Embedding,
            "embedding",
            "tunery.scoring.scorers.embedding:embedding_scorer",
            direction="maximize",
            version=2,
            by_option='a model and reference rows: `--by "{embedding: ./model, reference: good.jsonl}"`',
        ),
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
        ScorerEntry(
            Duplicates,
            "across",
            "tunery.scoring.scorers.exact_duplicates:DuplicatesScorer",
            direction="minimize",
            version=1,
            by_option=ByOption(str, default="normalised"),
            default_rule="<= 0",
        ),
        ScorerEntry(
            NearDuplicates,
            "across",
            "tunery.scoring.scorers.near_duplicates:NearDuplicatesScorer",
            direction="minimize",
            version=2,
            by_option=ByOption(_threshold_setting, default=""),
            default_rule="<= 0",
        ),
        ScorerEntry(
            Contamination,
            "row",
            "tunery.scoring.scorers.contamination:ContaminationScorer",
            direction="minimize",
            version=2,
            by_option=ByOption(_sets_setting, required="the rows that must not occur: `contamination=test.jsonl`"),
            default_rule="<= 0",
        ),
    ],
)
"""Every kind of scorer."""


def _scorer_tag(value: Any) -> str:
    """Return the tag of the scorer that a value is closest to, so that errors are about that scorer. Tags differ from
    the keys, because the location of an error contains both, but the file only the key."""
    if isinstance(value, ScorerSpec):
        return f"{value.kind()} scorer"
    if isinstance(value, dict) and value:
        given = [str(key) for key in value]
        exact = [key for key in given if key in SCORERS]
        near = [kind for key in given for kind in difflib.get_close_matches(key, SCORERS, n=1)]
        return f"{(exact or near or given)[0]} scorer"
    return "no scorer"


def _configs_by_tag() -> dict[str, type[ScorerSpec]]:
    return {f"{kind} scorer": entry.config for kind, entry in SCORERS.items()}


Scorer = Annotated[ScorerSpec, KindUnion(_configs_by_tag, _scorer_tag)]

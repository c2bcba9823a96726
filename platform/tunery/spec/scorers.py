"""What rows can be scored by. A scorer is a mapping whose first key names it: `{perplexity: base}`.

A new scorer: its class here and in `Scorer`, its file in scoring/scorers/, and its line in scoring/scorers/registry.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from tunery.spec.references import AUTO, ROWS, Auto, Config, Model, Pretrained, StageRef, model_inputs

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Part = Literal["answer", "whole"]
AnyPart = Literal["answer", "question", "whole"]
"""What is looked at. answer: the last turn of a conversation; question: its user turns; whole: all its turns. Of a
plain text, answer and whole are the text, and there is no question. Rejected answers are not looked at."""


class ScorerSpec(Config):
    """The first field of a scorer is its kind."""

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")] | None = None
    """What the score is called, where a stage has two of a kind; else its kind."""

    @classmethod
    def kind(cls) -> str:
        return next((field for field in cls.model_fields if field != "name"), "")

    @property
    def score(self) -> str:
        """The name of the score: the column in the table, and the key in `keep`."""
        return self.name or self.kind()

    @property
    def model(self) -> str | Pretrained | None:
        """Of scorers that need one."""
        return None

    @property
    def gives_vectors(self) -> bool:
        """Whether it keeps vectors of the rows instead of giving them a score."""
        return False

    def inputs(self) -> Iterator[StageRef]:
        """Stages that the scorer reads, by path within it."""
        if self.model is not None:
            yield from model_inputs((self.kind(),), self.model)


class Perplexity(ScorerSpec):
    """exp of the mean negative log-likelihood of a row's tokens. Lower is better.

    Marion et al. 2023, "When Less is More" (https://arxiv.org/abs/2309.04564).
    """

    perplexity: Model
    of: Literal["answer", "whole"] = "answer"
    """answer: of the last answer given all before it (of a text, the whole); whole: of every token."""

    @property
    def model(self) -> str | Pretrained:
        return self.perplexity


class Ifd(ScorerSpec):
    """Instruction-following difficulty: perplexity of the answer given the question over that of the answer alone.

    Near 1 (and above) the question does not help, so the two hardly belong together; near 0 the answer is trivial.
    Li et al. 2024, "From Quantity to Quality" (https://arxiv.org/abs/2308.12032), who take the highest below 1 for
    training. As a filter of damaged rows, lower is better.
    """

    ifd: Model

    @property
    def model(self) -> str | Pretrained:
        return self.ifd


class ClassificationSpec(ScorerSpec):
    """What scorers by a sequence-classification model have in common.

    A conversation is shown to it by its own chat template, or, where it has none, as a pair of texts (see
    models/classifier_inputs.py). Its hub revision or its folder's content belongs to the score.
    """

    def inputs(self) -> Iterator[StageRef]:
        if isinstance(self.model, str):
            yield StageRef((self.kind(),), self.model, ("classifier",))


class Reward(ClassificationSpec):
    """What a reward model gives a row: the one logit of its head, without bounds. Higher is better. Of a `reward` stage
    that is (logit - mean) / deviation, by the scale that was measured at its end.

    Stiennon et al. 2020, "Learning to summarize from human feedback" (https://arxiv.org/abs/2009.01325). Any
    sequence-classification model with one label will do, one that was trained to a regression, too.
    """

    reward: Model

    @property
    def model(self) -> str | Pretrained:
        return self.reward


class Classifier(ClassificationSpec):
    """Probability of one label under a text classifier. Higher is better: name the label of good rows, or give
    `prefer: low` in `keep`.

    A softmax over the labels; a sigmoid for each where the model's config says `multi_label_classification`, and for a
    model of one label. As in FineWeb-Edu (Penedo et al. 2024, https://arxiv.org/abs/2406.17557), whose own classifier
    is a regression: take `reward` for such a one.
    """

    classifier: Model
    label: str | Annotated[int, Field(ge=0)]
    """Its name or its number, as `id2label` in the model's config.json has them."""
    temperature: Annotated[float, Field(gt=0)] | Auto = 1.0
    """Logits are divided by it: above 1 probabilities are drawn together, below 1 apart (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). With two labels, or a sigmoid, the order of the rows stays. auto: the one that
    fits the eval_data of a `classifier` stage best."""

    @property
    def model(self) -> str | Pretrained:
        return self.classifier


class Embedding(ScorerSpec):
    """Cosine similarity to the most similar row of another stage. Higher is better: more like what is wanted.

    Of the mean of the model's last hidden states over the row's tokens, as in Reimers & Gurevych 2019, "Sentence-BERT"
    (https://arxiv.org/abs/1908.10084). A row that is in the other stage, too, has 1. Without another stage there is no
    score: the rows' vectors are kept, for `diverse` in a select stage.
    """

    embedding: Model
    """An encoder, or a causal language model without its head."""
    reference: str | None = None
    """Stage that gives the reference rows; of more than 2,048, so many by a hash of their ids."""

    @property
    def gives_vectors(self) -> bool:
        return self.reference is None

    @property
    def model(self) -> str | Pretrained:
        return self.embedding

    def inputs(self) -> Iterator[StageRef]:
        yield from super().inputs()
        if self.reference is not None:
            yield StageRef(("reference",), self.reference, ROWS)


class Length(ScorerSpec):
    """How long the answer is. Meant for a range in `keep`; as for `keep_fraction`, longer is better.

    Zhao et al. 2024, "Long Is More for Alignment" (https://arxiv.org/abs/2402.04833): the 1,000 longest answers are a
    baseline that is hard to beat.
    """

    length: Literal["words", "chars", "lines"]
    """words: what white space separates; in Chinese and Japanese each character, in Thai, Lao, Khmer and Burmese the
    words that ICU's dictionaries find (scoring/scorers/texts.py); chars: Unicode code points; lines: those that are not
    blank."""
    of: AnyPart = "answer"


class GopherRules(Config):
    """The rules' limits; `null` switches a rule off. A rule is violated beyond its limit, not at it.

    Words are those of `length: words`. The paper's limits are for web pages in English. `auto` takes these for English,
    and for other languages those of FineWeb-2 (Penedo et al. 2025, https://arxiv.org/abs/2506.20920), by the script of
    the text and the stop words in it (scoring/scorers/gopher_limits.py); a number holds for every language. On answers
    of a few sentences `words_min` and `stop_words_min` only say that they are short, and on code `mean_word_max`,
    `stop_words_min` and `alphabetic_words_min` say nothing. Switch those off there.
    """

    of: Part = "answer"
    words_min: Count | None = 50
    """Words (A1.1)."""
    words_max: Count | None = 100_000
    """Words (A1.1)."""
    mean_word_min: Annotated[float, Field(ge=0)] | Auto | None = AUTO
    """Characters (A1.1). auto: 3 in English, 1 to 3 in other scripts, none in a script that is not known."""
    mean_word_max: Annotated[float, Field(ge=0)] | Auto | None = AUTO
    """Characters (A1.1). auto: 10 in English, 15 in other languages in Latin letters, 5 (Chinese) to 37 (Tamil) in
    other scripts, none in a script that is not known."""
    hashes_max: Annotated[float, Field(ge=0)] | None = 0.1
    """Hash signs a word (A1.1)."""
    ellipses_max: Annotated[float, Field(ge=0)] | None = 0.1
    """Ellipses, as three dots or one character, a word (A1.1)."""
    bullet_lines_max: Share | None = 0.9
    """Share of the lines that start with a bullet point (A1.1)."""
    ellipsis_lines_max: Share | None = 0.3
    """Share of the lines that end with an ellipsis (A1.1)."""
    alphabetic_words_min: Share | None = 0.8
    """Share of the words with at least one letter (A1.1)."""
    stop_words_min: Annotated[int, Field(ge=1, le=8)] | Auto | None = AUTO
    """How many of `the be to of and that have with`, or of the stop words of the text's language, occur, in any case
    (A1.1). auto: 2, none in a script of which no stop words are known."""
    duplicate_lines_max: Share | None = 0.3
    """Share of the lines that stood before (table A1, as all below)."""
    duplicate_paragraphs_max: Share | None = 0.3
    """Share of the paragraphs (parted by blank lines) that stood before."""
    duplicate_line_chars_max: Share | None = 0.2
    """Share of the lines' characters that are in lines that stood before."""
    duplicate_paragraph_chars_max: Share | None = 0.2
    """Share of the paragraphs' characters that are in paragraphs that stood before."""
    top_2gram_max: Share | Auto | None = AUTO
    """Share of the words' characters that are in occurrences of the most frequent pair of words, if it occurs twice.
    auto: 0.2, 0.18 and 0.16 for n = 2, 3 and 4; in Chinese and Japanese, where a word is one character, 0.26, 0.21 and
    0.18."""
    top_3gram_max: Share | Auto | None = AUTO
    top_4gram_max: Share | Auto | None = AUTO
    duplicate_5grams_max: Share | Auto | None = AUTO
    """Share of the words' characters that are in runs of 5 words that stood before; each character counts once. auto:
    0.15 for n = 5, down to 0.1 for n = 10; in Chinese and Japanese 0.25 down to 0.16."""
    duplicate_6grams_max: Share | Auto | None = AUTO
    duplicate_7grams_max: Share | Auto | None = AUTO
    duplicate_8grams_max: Share | Auto | None = AUTO
    duplicate_9grams_max: Share | Auto | None = AUTO
    duplicate_10grams_max: Share | Auto | None = AUTO


class Gopher(ScorerSpec):
    """How many of MassiveText's quality and repetition rules a row violates. Lower is better.

    Rae et al. 2021, "Scaling Language Models" (https://arxiv.org/abs/2112.11446), section A1.1 and table A1, who drop a
    page for one violation.
    """

    gopher: GopherRules


class C4Rules(Config):
    """The rules' limits; `null` or `false` switches a rule off.

    The paper takes lines out of pages; rows are kept or dropped whole, so a rule on lines is violated when it would
    take out more than `failing_lines_max` of them, and sentences are counted in what all of them leave. Not here: the
    list of bad words (a file of somebody else's), citation marks (removed there, not judged), repeated spans of three
    sentences (see `duplicates`) and the language (see `language`).
    On short answers `sentences_min` only says that they are short; on code, `braces` and `terminal_punctuation` say
    that it is code.
    """

    of: Part = "answer"
    failing_lines_max: Share = 0.5
    """Share of the lines; ours, the paper has no such limit. 0: as soon as one line fails."""
    terminal_punctuation: bool = True
    """A line ends with a period, an exclamation or question mark (also of other scripts) or an end quotation mark. A
    line in Thai or Lao, which have no end marks, passes (mC4 has no such rule for that reason: Xue et al. 2021,
    https://arxiv.org/abs/2010.11934, section 3.1)."""
    line_words_min: Count | None = 5
    """Words a line, those of `length: words`."""
    javascript: bool = True
    """A line does not name Javascript."""
    policy: bool = True
    """A line does not speak of terms of use, privacy policies or cookies."""
    sentences_min: Count | None = 3
    """Sentences in the lines that pass the rules above. In Thai and Lao a space ends one."""
    lorem_ipsum: bool = True
    """The words `lorem ipsum` do not occur."""
    braces: bool = True
    """There is no curly bracket."""


class C4(ScorerSpec):
    """How many of C4's rules a row violates. Lower is better.

    Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (https://arxiv.org/abs/1910.10683), section 2.2.
    """

    c4: C4Rules


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
"""What is written for a code, and the code that is meant."""


class Language(ScorerSpec):
    """Probability that the row is in the language, by py3langid. Higher is better.

    Lui & Baldwin 2012, "langid.py" (https://aclanthology.org/P12-3005/). It is low where there is little to go by: 0.9
    drops 30% of the builtin answers, all of them English; 0.1 drops 3%, and each of 70 sentences in 14 other languages.
    The probability of a macrolanguage is the sum over its members: `zh` takes what the detector calls Wu (`wuu`) or
    Cantonese (`yue`), `no` Nynorsk (`nn`), `ar` Egyptian Arabic (`arz`), `ms` Indonesian (`id`). A member's own code
    is that member alone. `hr`, `sr` and `bs` are languages of their own; `hbs` is all three.
    """

    language: str
    """ISO 639 code: en, de, zh."""
    of: AnyPart = "answer"

    @field_validator("language")
    @classmethod
    def _known(cls, language: str) -> str:
        known = sorted({*LANGUAGES, *MACROLANGUAGES})
        if language not in known:
            written = language.lower()
            base = re.split("[-_]", written)[0]  # zh-CN, en_US
            meant = [code for code in (_OTHER_NAMES.get(written), _OTHER_NAMES.get(base), base) if code in known][:1]
            near = meant or difflib.get_close_matches(written, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(f'`{code}`' for code in near)}?" if near else ""
            raise ValueError(f"no language with this ISO 639 code is known, as en, de, zh{hint}")
        return language

    @property
    def members(self) -> tuple[str, ...]:
        """The detector's codes whose probabilities make up the language's."""
        return MACROLANGUAGES.get(self.language, (self.language,))


class Duplicates(ScorerSpec):
    """How many rows before this one have the same content: 0 for the first. Lower is better; keep those at 0."""

    duplicates: Literal["exact", "normalised"]
    """exact: as the row's id has it (Unicode NFC, white space at the end dropped); normalised: case and the amount of
    white space aside as well."""
    of: Literal["row", "question", "answer"] = "row"
    """row: all there is, roles and rejected answers too."""


class NearDuplicatesSettings(Config):
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of the sets of n-grams from which on rows are near duplicates (Lee et al. 2022, 4.2)."""
    ngram: Count = 5
    """Words (Lee et al. 2022, appendix A); a shorter text is one n-gram."""
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Hash functions: the estimate's standard error is at most 0.5 / sqrt(permutations), 0.044 for 128. Four bytes each
    a row."""
    of: AnyPart = "whole"


class NearDuplicates(ScorerSpec):
    """Similarity to the most similar earlier row, 0 where none reaches the threshold. Lower is better; keep those at 0.

    MinHash (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900) with LSH, as in Lee et al. 2022, "Deduplicating
    Training Data Makes Language Models Better" (https://arxiv.org/abs/2107.06499).
    """

    near_duplicates: NearDuplicatesSettings


class ContaminationSettings(Config):
    sets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Stages whose rows must not be among those that are scored: evaluation sets."""
    ngram: Annotated[int, Field(ge=2)] = 13
    """Words (appendix C; the paper takes 8 to 13). Shorter texts use their whole length."""
    of: AnyPart = "whole"
    """In the scored rows and in the sets' alike."""

    @field_validator("sets")
    @classmethod
    def _distinct(cls, sets: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in sets if sets.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is named twice")
        return sets


class Contamination(ScorerSpec):
    """Share of the row's n-grams that occur in an evaluation set. Lower is better; keep those at 0.

    Brown et al. 2020, "Language Models are Few-Shot Learners" (https://arxiv.org/abs/2005.14165), appendix C.
    """

    contamination: ContaminationSettings

    def inputs(self) -> Iterator[StageRef]:
        for index, stage in enumerate(self.contamination.sets):
            yield StageRef(("contamination", "sets", index), stage, ROWS)


SCORERS: tuple[type[ScorerSpec], ...] = (
    Perplexity,
    Ifd,
    Reward,
    Classifier,
    Embedding,
    Length,
    Gopher,
    C4,
    Language,
    Duplicates,
    NearDuplicates,
    Contamination,
)


def _scorer_tag(value: Any) -> str:
    """Which scorer is meant, so that an error speaks of that one. Other than its key: what names the place of an error
    holds both, and the file has the key alone."""
    if isinstance(value, ScorerSpec):
        return f"{value.kind()} scorer"
    if isinstance(value, dict) and value:
        kinds = [scorer.kind() for scorer in SCORERS]
        given = [str(key) for key in value]
        exact = [key for key in given if key in kinds]
        near = [kind for key in given for kind in difflib.get_close_matches(key, kinds, n=1)]
        return f"{(exact or near or given)[0]} scorer"
    return "no scorer"


Scorer = Annotated[
    Annotated[Perplexity, Tag("perplexity scorer")]
    | Annotated[Ifd, Tag("ifd scorer")]
    | Annotated[Reward, Tag("reward scorer")]
    | Annotated[Classifier, Tag("classifier scorer")]
    | Annotated[Embedding, Tag("embedding scorer")]
    | Annotated[Length, Tag("length scorer")]
    | Annotated[Gopher, Tag("gopher scorer")]
    | Annotated[C4, Tag("c4 scorer")]
    | Annotated[Language, Tag("language scorer")]
    | Annotated[Duplicates, Tag("duplicates scorer")]
    | Annotated[NearDuplicates, Tag("near_duplicates scorer")]
    | Annotated[Contamination, Tag("contamination scorer")],
    Discriminator(_scorer_tag),
]

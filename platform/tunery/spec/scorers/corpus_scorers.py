"""Configs and registry entries of the scorers that compare a row with other rows: duplicates, contamination."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tunery.spec.references import ROWS, Config, StageRef
from tunery.spec.scorers.scorer_entry import ByOption, Count, RowPart, ScorerEntry, ScorerSpec
from tunery.spec.yaml_source import plain_scalar


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


def _threshold_setting(value: str) -> dict[str, Any]:
    return {"threshold": plain_scalar(value)} if value else {}


def _sets_setting(value: str) -> dict[str, list[str]]:
    return {"sets": [value]}


CORPUS_SCORERS = (
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
)

"""The `review` stage: the rows that pass the filter, less those that a person dropped, with those that one kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tunery.errors import RowsLost, StageError
from tunery.ingest.corruption_metrics import Bools, filter_quality
from tunery.review.agreement import agreement, best_threshold
from tunery.review.decisions import Decision, decisions_identity, decisions_path, read_decisions
from tunery.review.filter_results import FilterResult, read_filter_results
from tunery.review.sample import BANDS, Sample, sample_rows
from tunery.spec import Review
from tunery.store import StageContext, StageResult
from tunery.store.rows import REVIEWED_DIR, Row, read_rows, write_rows

REVIEW_RULE = "review"
"""The rule by which a person dropped a row, in dropped.jsonl."""


def run_review(context: StageContext) -> StageResult:
    """Writes rows/, dropped.jsonl, and the decided rows with their labels (REVIEWED_DIR, store/rows.py); needs
    somebody's decision on at least one row.

    Facts: rows_in, kept, dropped; decided (different rows); restored and removed (rows on
    which the person changed the verdict); agreement with
    the filter, by stratum too; for each score the threshold that agrees best; how well both found planted rows.
    """
    stage = context.spec
    assert isinstance(stage, Review)
    selection = context.inputs[stage.data]
    filtered = read_filter_results(selection)
    sample = sample_rows(filtered.ids, filtered.sources, filtered.distance, stage.rows, context.seed)
    decided = read_decisions(decisions_path(stage, context.folder))
    known = set(filtered.ids)
    ours = {id: decision for id, decision in decided.items() if id in known}
    if not ours:
        raise _nothing_decided(context, stage, len(decided), len(sample.rows))
    if decisions_identity(stage, context.folder) != context.identity["content"]:
        raise StageError(
            context.name,
            f"{stage.decisions} has changed since this run began",
            cause="somebody is reviewing; what is made now would not be what its fingerprint says",
            remedy="give the same command again once the review is done",
        )
    kept = filtered.kept.copy()
    for index, id in enumerate(filtered.ids):
        if id in ours:
            kept[index] = ours[id] == "keep"
    if not kept.any():
        raise StageError(
            context.name,
            f"no row of {len(kept):,} is left",
            cause=f"the filter kept {int(filtered.kept.sum()):,}, and {stage.decisions} drops all of them",
            remedy="loosen the filter's rule, or look at the decisions again",
        )
    rules = {line["id"]: line["rule"] for line in _lines(selection.path / "dropped.jsonl")}
    planted: list[str | None] = []
    labelled: dict[str, Row] = {}

    with (context.out / "dropped.jsonl").open("w", encoding="utf-8") as file:

        def kept_rows() -> Iterator[Row]:
            for index, row in enumerate(read_rows(filtered.scored)):
                planted.append(row["planted"])
                if row["id"] in ours:
                    labelled.setdefault(row["id"], {**row, "label": ours[row["id"]] == "keep"})
                if kept[index]:
                    yield row
                else:
                    rule = REVIEW_RULE if row["id"] in ours else rules[row["id"]]
                    file.write(json.dumps({"id": row["id"], "line": row["line"], "rule": rule}) + "\n")

        written = write_rows(kept_rows(), context.out)
    dropped = sum(1 for _ in _lines(context.out / "dropped.jsonl"))
    if written + dropped != len(kept) or written != int(kept.sum()):
        raise RowsLost(context.name, f"{len(kept)} rows went in, {written} kept, {dropped} dropped")
    write_rows(labelled.values(), context.out / REVIEWED_DIR)
    truth = [kind for kind in planted if kind is not None]
    return StageResult(
        {
            "rows": written,
            "rows_in": len(kept),
            "kept": written,
            "dropped": dropped,
            "decided": len(labelled),
            "restored": int((kept & ~filtered.kept).sum()),
            "removed": int((~kept & filtered.kept).sum()),
            **compare(filtered, sample, ours),
            "decisions_about_other_rows": len(decided) - len(ours),
            "planted": filter_quality(~kept, None, truth) if len(truth) == len(kept) else None,
        }
    )


def compare(filtered: FilterResult, sample: Sample, decided: Mapping[str, Decision]) -> dict[str, Any]:
    """The filter and the person on the rows that were decided, each different row counted once.

    asked, answered (of those asked), agreement, strata (of the sample), thresholds. Decided rows outside the sample
    (from a sample of another cut or size) count for agreement and thresholds, not for strata.
    """
    first: dict[str, int] = {}
    for index, id in enumerate(filtered.ids):
        if id in decided:
            first.setdefault(id, index)
    places = np.array(list(first.values()), dtype=int)
    person = np.array([decided[id] == "keep" for id in first], dtype=bool)
    return {
        "asked": len(sample.rows),
        "answered": sum(row.id in decided for row in sample.rows),
        "agreement": agreement(filtered.kept[places], person),
        "strata": _strata(filtered.kept, sample, decided),
        "thresholds": [_threshold(filtered, score, places, person) for score in filtered.cuts],
    }


def _strata(kept: Bools, sample: Sample, decided: Mapping[str, Decision]) -> list[dict[str, Any]]:
    asked = Counter(row.stratum for row in sample.rows)
    answered = Counter(row.stratum for row in sample.rows if row.id in decided)
    agreed = Counter(
        row.stratum for row in sample.rows if row.id in decided and (decided[row.id] == "keep") == kept[row.index]
    )
    several = len({stratum.source for stratum in sample.available}) > 1
    order = {band: place for place, band in enumerate(BANDS)}
    found = []
    for stratum in sorted(sample.available, key=lambda it: (it.side == "dropped", order[it.band], it.source)):
        name = f"{stratum.side}, {stratum.band}" + (f", {stratum.source}" if several else "")
        share = agreed[stratum] / answered[stratum] if answered[stratum] else None
        found.append(
            {
                "name": name,
                "rows": sample.available[stratum],
                "asked": asked[stratum],
                "answered": answered[stratum],
                "agreement": share,
            }
        )
    return found


def _threshold(filtered: FilterResult, score: str, places: Any, person: Bools) -> dict[str, Any]:
    """In the score itself, as `keep: {<score>: {threshold: ..}}` takes it. The filter's own cut is for comparison: by
    this score alone, where there are several rules."""
    sign = filtered.signs[score]
    badness, now = filtered.badness[score][places], sign * filtered.cuts[score]
    best = best_threshold(badness, person, now)
    finite = badness[np.isfinite(badness)] * sign
    return {
        "score": score,
        "cut": filtered.cuts[score],
        "agreement_at_cut": float(((badness <= now) == person).mean()),
        "threshold": None if best is None else sign * best.value,
        "agreement": None if best is None else best.agreement,
        "beyond_reviewed": None if best is None else best.at_edge,
        "lowest_reviewed": float(finite.min()) if len(finite) else None,
        "highest_reviewed": float(finite.max()) if len(finite) else None,
    }


def _nothing_decided(context: StageContext, stage: Review, elsewhere: int, asked: int) -> StageError:
    if elsewhere:
        cause = f"the {elsewhere:,} decisions in {stage.decisions} are about other rows than those of `{stage.data}`"
    else:
        cause = f"there are no decisions in {stage.decisions} yet"
    return StageError(
        context.name,
        f"nobody has decided on its rows yet ({asked:,} wait)",
        cause=cause,
        remedy=f"look at them with `{context.command('review', context.name)}`, then give this command again",
    )


def _lines(path: Any) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)

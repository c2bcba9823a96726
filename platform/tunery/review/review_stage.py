"""The `review` stage: applies the decisions of a reviewer to the rows selected by a filter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tunery.errors import RowCountError, StageError
from tunery.ingest.corruption_metrics import Bools, filter_quality
from tunery.review.agreement import agreement, best_threshold
from tunery.review.decisions import Decision, decisions_identity, decisions_path, read_decisions
from tunery.review.filter_results import FilterResult, read_filter_results
from tunery.review.sample import BANDS, Sample, sample_rows
from tunery.spec import Review
from tunery.store import StageContext, StageResult
from tunery.store.rows import REVIEWED_DIR, Row, read_rows, write_rows

REVIEW_RULE = "review"
"""Rule name in dropped.jsonl of a row that the reviewer dropped."""


def run_review(context: StageContext) -> StageResult:
    """Write rows/, dropped.jsonl, and the decided rows with their labels (REVIEWED_DIR, store/rows.py). Requires a
    decision on at least one row.

    Facts: rows_in, kept, dropped; decided (distinct rows); restored and removed (rows whose outcome the reviewer
    changed); agreement with the filter, also by stratum; for each score the threshold that agrees best; how well filter
    and review together detect corrupted rows.
    """
    stage = context.spec
    assert isinstance(stage, Review)
    selection = context.inputs[stage.data]
    filtered = read_filter_results(selection)
    sample = sample_rows(filtered.ids, filtered.sources, filtered.distance, stage.rows, context.seed)
    all_decisions = read_decisions(decisions_path(stage, context.folder))
    known_ids = set(filtered.ids)
    decisions = {id: decision for id, decision in all_decisions.items() if id in known_ids}
    if not decisions:
        raise _nothing_decided_error(context, stage, len(all_decisions), len(sample.rows))
    if decisions_identity(stage, context.folder) != context.identity["content"]:
        raise StageError(
            context.name,
            f"{stage.decisions} has changed since this run began",
            cause="a review is in progress, and the result would not match its fingerprint",
            remedy="run the same command again after the review",
        )
    kept = filtered.kept.copy()
    for index, id in enumerate(filtered.ids):
        if id in decisions:
            kept[index] = decisions[id] == "keep"
    if not kept.any():
        raise StageError(
            context.name,
            f"no row of {len(kept):,} is left",
            cause=f"the filter kept {int(filtered.kept.sum()):,}, and {stage.decisions} drops all of them",
            remedy="loosen the rule of the filter, or check the decisions",
        )
    rules = {line["id"]: line["rule"] for line in _read_jsonl(selection.path / "dropped.jsonl")}
    corruption_kinds: list[str | None] = []
    labelled: dict[str, Row] = {}

    with (context.out / "dropped.jsonl").open("w", encoding="utf-8") as file:

        def kept_rows() -> Iterator[Row]:
            for index, row in enumerate(read_rows(filtered.scored)):
                corruption_kinds.append(row["injected_corruption"])
                if row["id"] in decisions:
                    labelled.setdefault(row["id"], {**row, "label": decisions[row["id"]] == "keep"})
                if kept[index]:
                    yield row
                else:
                    rule = REVIEW_RULE if row["id"] in decisions else rules[row["id"]]
                    file.write(json.dumps({"id": row["id"], "line": row["line"], "rule": rule}) + "\n")

        written = write_rows(kept_rows(), context.out)
    dropped = sum(1 for _ in _read_jsonl(context.out / "dropped.jsonl"))
    if written + dropped != len(kept) or written != int(kept.sum()):
        raise RowCountError(context.name, f"{len(kept)} rows went in, {written} kept, {dropped} dropped")
    write_rows(labelled.values(), context.out / REVIEWED_DIR)
    known_kinds = [kind for kind in corruption_kinds if kind is not None]
    return StageResult(
        {
            "rows": written,
            "rows_in": len(kept),
            "kept": written,
            "dropped": dropped,
            "decided": len(labelled),
            "restored": int((kept & ~filtered.kept).sum()),
            "removed": int((~kept & filtered.kept).sum()),
            **compare(filtered, sample, decisions),
            "decisions_about_other_rows": len(all_decisions) - len(decisions),
            "injected_corruption": filter_quality(~kept, None, known_kinds) if len(known_kinds) == len(kept) else None,
        }
    )


def compare(filtered: FilterResult, sample: Sample, decisions: Mapping[str, Decision]) -> dict[str, Any]:
    """Compare filter and reviewer on the decided rows; each distinct row counts once.

    Facts: sampled (sample size), sampled_decided (sampled rows with a decision), agreement, strata (of the sample),
    thresholds. Decided rows outside the sample (from a sample of another threshold or size) count for agreement and
    thresholds, but not for strata.
    """
    first_index: dict[str, int] = {}
    for index, id in enumerate(filtered.ids):
        if id in decisions:
            first_index.setdefault(id, index)
    indices = np.array(list(first_index.values()), dtype=int)
    person_keeps = np.array([decisions[id] == "keep" for id in first_index], dtype=bool)
    return {
        "sampled": len(sample.rows),
        "sampled_decided": sum(row.id in decisions for row in sample.rows),
        "agreement": agreement(filtered.kept[indices], person_keeps),
        "strata": _strata_facts(filtered.kept, sample, decisions),
        "thresholds": [_threshold_facts(filtered, score, indices, person_keeps) for score in filtered.thresholds],
    }


def _strata_facts(kept: Bools, sample: Sample, decisions: Mapping[str, Decision]) -> list[dict[str, Any]]:
    sampled = Counter(row.stratum for row in sample.rows)
    decided = Counter(row.stratum for row in sample.rows if row.id in decisions)
    agreed = Counter(
        row.stratum for row in sample.rows if row.id in decisions and (decisions[row.id] == "keep") == kept[row.index]
    )
    has_several_sources = len({stratum.source for stratum in sample.available}) > 1
    strata = []
    for stratum in sorted(sample.available, key=lambda it: (it.side == "dropped", BANDS.index(it.band), it.source)):
        name = f"{stratum.side}, {stratum.band}" + (f", {stratum.source}" if has_several_sources else "")
        strata.append(
            {
                "name": name,
                "rows": sample.available[stratum],
                "sampled": sampled[stratum],
                "decided": decided[stratum],
                "agreement": agreed[stratum] / decided[stratum] if decided[stratum] else None,
            }
        )
    return strata


def _threshold_facts(filtered: FilterResult, score: str, indices: Any, person_keeps: Bools) -> dict[str, Any]:
    """Return the best threshold in units of the score, as for `keep: {<score>: {threshold: ..}}`, and the agreement at
    the current threshold of this score alone for comparison."""
    sign = filtered.signs[score]
    badness, current = filtered.badness[score][indices], sign * filtered.thresholds[score]
    best = best_threshold(badness, person_keeps, current)
    finite = badness[np.isfinite(badness)] * sign
    return {
        "score": score,
        "current_threshold": filtered.thresholds[score],
        "current_agreement": float(((badness <= current) == person_keeps).mean()),
        "threshold": None if best is None else sign * best.value,
        "agreement": None if best is None else best.agreement,
        "beyond_reviewed": None if best is None else best.at_edge,
        "lowest_reviewed": float(finite.min()) if len(finite) else None,
        "highest_reviewed": float(finite.max()) if len(finite) else None,
    }


def _nothing_decided_error(
    context: StageContext, stage: Review, num_other_decisions: int, sample_size: int
) -> StageError:
    if num_other_decisions:
        cause = (
            f"the {num_other_decisions:,} decisions in {stage.decisions} are for rows that are not in `{stage.data}`"
        )
    else:
        cause = f"there are no decisions in {stage.decisions} yet"
    return StageError(
        context.name,
        f"none of its {sample_size:,} sampled rows has a decision",
        cause=cause,
        remedy=f"review them with `{context.command('review', context.name)}`, then run this command again",
    )


def _read_jsonl(path: Any) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)

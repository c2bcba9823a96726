"""The `select` stage: the rows that pass every rule; dropped.jsonl lists the others with the rule that dropped them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from tunery.data.judge import Bools, Floats, filter_quality
from tunery.data.scorers import SCORERS
from tunery.errors import RowsLost, StageError
from tunery.spec import Keep, Select
from tunery.store import StageContext, StageResult
from tunery.store.rows import Row, read_rows, shards, write_rows


def make_selection(context: StageContext) -> StageResult:
    """Facts: rows_in, kept, dropped, and per rule its cut and how many it dropped; how well it found planted rows."""
    stage = context.spec
    assert isinstance(stage, Select)
    scored = context.inputs[stage.data]
    tables = [pq.read_table(scored.path / "scores" / path.name) for path in shards(scored.path)]
    kept = np.ones(sum(table.num_rows for table in tables), dtype=bool)
    reasons: list[str] = [""] * len(kept)
    rules: list[dict[str, Any]] = []
    badness: Floats | None = None
    for score, rule in stage.keep.items():
        values = np.concatenate([table[score].to_numpy() for table in tables])
        badness = values if SCORERS[score].good == "low" else -values
        passed, cut = passing(badness, rule, SCORERS[score].good)
        described = describe(score, rule)
        for index in np.flatnonzero(kept & ~passed):
            reasons[index] = described
        rules.append(
            {
                "score": score,
                "rule": described,
                "cut": cut if SCORERS[score].good == "low" else -cut,
                "dropped": int((kept & ~passed).sum()),
            }
        )
        kept &= passed
    if not kept.any():
        raise StageError(
            context.name,
            f"no row of {len(kept):,} passes",
            cause="; ".join(f"`{rule['rule']}` dropped {rule['dropped']:,}" for rule in rules),
            remedy="loosen the rule; the scores' spread is in the report",
        )
    planted: list[str | None] = []

    with (context.out / "dropped.jsonl").open("w", encoding="utf-8") as file:

        def passed_rows() -> Iterator[Row]:
            for index, row in enumerate(read_rows(scored.path)):
                planted.append(row["planted"])
                if kept[index]:
                    yield row
                else:
                    file.write(json.dumps({"id": row["id"], "line": row["line"], "rule": reasons[index]}) + "\n")

        written = write_rows(passed_rows(), context.out)
    if written != int(kept.sum()) or len(planted) != len(kept):
        raise RowsLost(context.name, f"{len(planted)} rows went in, {written} kept, {int((~kept).sum())} dropped")
    truth = [kind for kind in planted if kind is not None]
    single = badness if len(rules) == 1 else None
    return StageResult(
        {
            "rows": written,
            "rows_in": len(kept),
            "kept": written,
            "dropped": len(kept) - written,
            "rules": rules,
            "planted": filter_quality(~kept, _without_nan(single), truth) if len(truth) == len(kept) else None,
        }
    )


def passing(badness: Floats, rule: Keep, good: Literal["low", "high"] = "low") -> tuple[Bools, float]:
    """Which rows pass, and the worst badness that does. Rows without a score (NaN) never pass, save quantile 1.

    `badness` is the score where low is good, else its negative; a threshold is on the score itself.
    quantile q keeps the round(q n) best; ties at the cut go to the rows that come first, so the share is exact.
    """
    n = len(badness)
    comparable = _without_nan(badness)
    if rule.threshold is not None:
        worst = rule.threshold if good == "low" else -rule.threshold
        return comparable <= worst, worst
    assert rule.quantile is not None, "a rule has one of the two"
    passed = np.zeros(n, dtype=bool)
    order = np.argsort(comparable, kind="stable")[: round(rule.quantile * n)]
    passed[order] = True
    if rule.quantile < 1:
        passed &= np.isfinite(comparable)
    return passed, float(comparable[passed].max()) if passed.any() else -math.inf


def describe(score: str, rule: Keep) -> str:
    if rule.quantile is not None:
        return f"{score} quantile {rule.quantile:g}"
    return f"{score} threshold {rule.threshold:g}"


def _without_nan(values: Any) -> Any:
    return None if values is None else np.where(np.isnan(values), math.inf, values)

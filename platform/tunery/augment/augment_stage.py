"""The `augment` stage: rows in, their variants out; dropped.jsonl lists the rows that are held out.

A row without a question (a plain text) comes out as it is, and is counted. Rows pass in pieces of 1,024 on one core, in
the driver; in memory are besides the hashes of the held-out rows (heldout.py) and the examples (pool.py). A core makes
some 5,000 variants a second of 500 characters with two examples each: six hours for 100 M.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tunery.augment.few_shot_pool import FewShotPool, read_pool
from tunery.augment.heldout_rows import Heldout, flag_heldout
from tunery.augment.prompt_variants import Variant, distinct, variants
from tunery.errors import RowsLost, StageError
from tunery.ingest.row_samples import excerpt
from tunery.spec import Augment
from tunery.store import StageContext, StageResult
from tunery.store.rows import Row, count_rows, write_rows

SHOWN = 3
"""Rows that the report shows before and after."""
TEXT = 1200
"""Characters of a prompt that it shows."""


def run_augment(context: StageContext) -> StageResult:
    """Facts: rows_in, what became of them (augmented, unchanged by reason, heldout); rows, variants, originals;
    repeated (variants that said the same as another of their row, and are left out); variants by template, by answer
    and by number of examples; fewer_examples by reason; how many rows may serve as examples, and why others may not;
    a few rows before and after."""
    stage, seed = context.spec, context.seed
    assert isinstance(stage, Augment)
    data = context.inputs[stage.data].path
    total = count_rows(data)
    heldout = Heldout(context.inputs[name].path for name in stage.heldout)
    pool = _pool(context, stage, heldout)
    tally = AugmentCounts()

    with (context.out / "dropped.jsonl").open("w", encoding="utf-8") as file:

        def augmented() -> Iterator[Row]:
            for row, held in flag_heldout(data, heldout):
                tally.rows_in += 1
                if tally.rows_in % 1024 == 0:
                    context.emit("progress", done=tally.rows_in, total=total, unit="rows")
                if held:
                    file.write(json.dumps(_dropped(row), ensure_ascii=False) + "\n")
                    continue
                made = variants(row, stage, pool, seed)
                if isinstance(made, str):
                    tally.unchanged[made] += 1
                    yield row
                    continue
                kept = distinct(row, made, stage.originals)
                tally.see(row, kept, len(made) - len(kept))
                if stage.originals:
                    yield row
                yield from (variant.row for variant in kept)

        written = write_rows(augmented(), context.out)

    dropped = sum(1 for _ in (context.out / "dropped.jsonl").open(encoding="utf-8"))
    _check(context, stage, tally, total, written, dropped)
    return StageResult(
        {
            "rows": written,
            "rows_in": total,
            "augmented": tally.augmented,
            "unchanged": dict(sorted(tally.unchanged.items())),
            "heldout": dropped,
            "variants": tally.variants,
            "originals": tally.augmented if stage.originals else 0,
            "repeated": tally.repeated,
            "templates": [
                {"template": template, "variants": tally.templates[index]}
                for index, template in enumerate(stage.templates)
            ],
            "answers": dict(sorted(tally.forms.items())),
            "shots": {str(shots): tally.shots[shots] for shots in sorted(tally.shots)},
            "fewer_examples": dict(sorted(tally.fewer.items())),
            "examples": {"rows": pool.fit, "drawn_from": len(pool), "unfit": dict(sorted(pool.unfit.items()))},
            "heldout_rows": len(heldout),
            "samples": {"rows": tally.samples()},
        }
    )


@dataclass
class AugmentCounts:
    """What became of the rows."""

    rows_in: int = 0
    augmented: int = 0
    variants: int = 0
    repeated: int = 0
    unchanged: Counter[str] = field(default_factory=Counter)
    templates: Counter[int] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    shots: Counter[int] = field(default_factory=Counter)
    fewer: Counter[str] = field(default_factory=Counter)
    _shown: list[tuple[int, Row, Variant]] = field(default_factory=list)
    """Of the rows with the smallest ids, which are hashes; a heap with the largest first."""

    def see(self, row: Row, made: list[Variant], repeated: int) -> None:
        self.augmented += 1
        self.variants += len(made)
        self.repeated += repeated
        for variant in made:
            self.templates[variant.template] += 1
            self.forms[variant.form] += 1
            self.shots[variant.shots] += 1
            if variant.fewer:
                self.fewer[variant.fewer] += 1
        order = -int(row["id"], 16)
        if made and order not in [shown[0] for shown in self._shown]:
            if len(self._shown) < SHOWN:
                heapq.heappush(self._shown, (order, row, made[0]))
            elif order > self._shown[0][0]:
                heapq.heapreplace(self._shown, (order, row, made[0]))

    def samples(self) -> list[dict[str, str]]:
        shown = sorted(self._shown, key=lambda item: -item[0])
        return [{"before": excerpt(row), "after": conversation(variant.row)} for _, row, variant in shown]


def conversation(row: Row) -> str:
    """All turns, each in a paragraph with its role, in at most TEXT characters, of which the end is the row's own."""
    text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["messages"])
    return text if len(text) <= TEXT else f"{text[: TEXT // 2]} … {text[-TEXT // 2 :]}"


def _pool(context: StageContext, stage: Augment, heldout: Heldout) -> FewShotPool:
    few_shot = stage.few_shot
    if few_shot is None or not few_shot.counts[-1]:
        return FewShotPool()
    source = few_shot.examples or stage.data
    context.emit("progress", done=0, total=None, unit="rows", detail="drawing examples")
    separator = stage.chain_of_thought.separator if stage.chain_of_thought else None
    pool = read_pool(context.inputs[source].path, heldout, separator, few_shot.max_chars, context.seed)
    if not len(pool):
        raise StageError(
            context.name,
            f"no row of `{source}` can serve as an example",
            cause="; ".join(f"{reason}: {count:,}" for reason, count in sorted(pool.unfit.items())),
            remedy="name a stage of other rows in `few_shot.examples`: one question each, with an answer",
        )
    return pool


def _dropped(row: Row) -> dict[str, Any]:
    return {"id": row["id"], "source": row["source"], "line": row["line"], "rule": "held out"}


def _check(context: StageContext, stage: Augment, tally: AugmentCounts, total: int, written: int, dropped: int) -> None:
    """Raises RowsLost, and StageError where nothing was done that was asked for."""
    unchanged = tally.unchanged.total()
    if total != tally.augmented + unchanged + dropped or tally.rows_in != total:
        raise RowsLost(
            context.name,
            f"{total} rows went in; {tally.augmented} were augmented, {unchanged} came out as they were, {dropped} are "
            "held out",
        )
    expected = tally.augmented * (stage.copies + stage.originals) - tally.repeated + unchanged
    if written != expected:
        raise RowsLost(context.name, f"{expected} rows were made, {written} written")
    if not tally.augmented:
        reasons = Counter({"held out": dropped, **tally.unchanged})
        raise StageError(
            context.name,
            f"no row of {total:,} can be augmented",
            cause="; ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items()) if count),
            remedy="give rows with questions, and hold out others than those",
        )
    if stage.chain_of_thought is not None and not tally.forms["reasoned"] + tally.forms["direct"]:
        raise StageError(
            context.name,
            f"no answer holds reasoning, `{stage.chain_of_thought.separator}` and a final answer",
            cause=f"{tally.augmented:,} rows were looked at",
            remedy="name the separator that the answers have, or leave `chain_of_thought` out",
        )

"""The `augment` stage: replaces each row by prompt variants; dropped.jsonl lists the held-out rows.

A row without a question (a plain text) is written unchanged and counted. The stage runs on one core in the driver, in
batches of 1,024 rows; it also holds the hashes of the held-out rows (heldout_rows.py) and the few-shot examples
(few_shot_pool.py) in memory. One core builds about 5,000 variants a second of 500 characters with two examples each:
six hours for 100 M.
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
from tunery.errors import RowCountError, StageError
from tunery.ingest.row_samples import excerpt
from tunery.spec import Augment
from tunery.store import StageContext, StageResult
from tunery.store.rows import Row, count_rows, write_rows

NUM_SAMPLES = 3
"""Number of rows that the report shows before and after augmentation."""
MAX_SAMPLE_CHARS = 1200
"""Maximum number of characters of a prompt in the report."""


def run_augment(context: StageContext) -> StageResult:
    """Write the variants.

    Facts: rows_in, split into augmented, unchanged (by reason) and heldout; rows, variants, originals; repeated
    (variants omitted because they equal another variant of the row); variants by template, by response form and by
    number of examples; fewer_examples by reason; the number of rows usable as examples, and the reasons why others are
    not; a few rows before and after.
    """
    stage, seed = context.spec, context.seed
    assert isinstance(stage, Augment)
    data = context.inputs[stage.data].path
    total = count_rows(data)
    heldout = Heldout(context.inputs[name].path for name in stage.heldout)
    pool = _build_pool(context, stage, heldout)
    counts = AugmentCounts()

    with (context.out / "dropped.jsonl").open("w", encoding="utf-8") as file:

        def augmented_rows() -> Iterator[Row]:
            for row, is_heldout in flag_heldout(data, heldout):
                counts.rows_in += 1
                if counts.rows_in % 1024 == 0:
                    context.emit("progress", done=counts.rows_in, total=total, unit="rows")
                if is_heldout:
                    file.write(json.dumps(_dropped_entry(row), ensure_ascii=False) + "\n")
                    continue
                built = variants(row, stage, pool, seed)
                if isinstance(built, str):
                    counts.unchanged[built] += 1
                    yield row
                    continue
                kept = distinct(row, built, stage.originals)
                counts.add(row, kept, len(built) - len(kept))
                if stage.originals:
                    yield row
                yield from (variant.row for variant in kept)

        written = write_rows(augmented_rows(), context.out)

    dropped = sum(1 for _ in (context.out / "dropped.jsonl").open(encoding="utf-8"))
    _validate_counts(context, stage, counts, total, written, dropped)
    return StageResult(
        {
            "rows": written,
            "rows_in": total,
            "augmented": counts.augmented,
            "unchanged": dict(sorted(counts.unchanged.items())),
            "heldout": dropped,
            "variants": counts.variants,
            "originals": counts.augmented if stage.originals else 0,
            "repeated": counts.repeated,
            "templates": [
                {"template": template, "variants": counts.templates[index]}
                for index, template in enumerate(stage.templates)
            ],
            "response_forms": dict(sorted(counts.forms.items())),
            "shots": {str(shots): counts.shots[shots] for shots in sorted(counts.shots)},
            "fewer_examples": dict(sorted(counts.fewer.items())),
            "examples": {
                "usable": pool.num_usable,
                "pool_size": len(pool),
                "unusable": dict(sorted(pool.unusable.items())),
            },
            "heldout_rows": len(heldout),
            "samples": {"rows": counts.samples()},
        }
    )


@dataclass
class AugmentCounts:
    """Counts of rows and variants, and a few sample variants."""

    rows_in: int = 0
    augmented: int = 0
    variants: int = 0
    repeated: int = 0
    unchanged: Counter[str] = field(default_factory=Counter)
    templates: Counter[int] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    shots: Counter[int] = field(default_factory=Counter)
    fewer: Counter[str] = field(default_factory=Counter)
    _samples: list[tuple[int, Row, Variant]] = field(default_factory=list)
    """The rows with the smallest ids, which are hashes; a heap with the largest id first."""

    def add(self, row: Row, row_variants: list[Variant], repeated: int) -> None:
        self.augmented += 1
        self.variants += len(row_variants)
        self.repeated += repeated
        for variant in row_variants:
            self.templates[variant.template] += 1
            self.forms[variant.form] += 1
            self.shots[variant.shots] += 1
            if variant.fewer:
                self.fewer[variant.fewer] += 1
        negative_id = -int(row["id"], 16)
        if row_variants and negative_id not in [sample[0] for sample in self._samples]:
            if len(self._samples) < NUM_SAMPLES:
                heapq.heappush(self._samples, (negative_id, row, row_variants[0]))
            elif negative_id > self._samples[0][0]:
                heapq.heapreplace(self._samples, (negative_id, row, row_variants[0]))

    def samples(self) -> list[dict[str, str]]:
        ordered = sorted(self._samples, key=lambda item: -item[0])
        return [{"before": excerpt(row), "after": render_messages(variant.row)} for _, row, variant in ordered]


def render_messages(row: Row) -> str:
    """Return all messages with their roles as text, with the middle omitted beyond MAX_SAMPLE_CHARS."""
    text = "\n\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])
    if len(text) <= MAX_SAMPLE_CHARS:
        return text
    return f"{text[: MAX_SAMPLE_CHARS // 2]} … {text[-MAX_SAMPLE_CHARS // 2 :]}"


def _build_pool(context: StageContext, stage: Augment, heldout: Heldout) -> FewShotPool:
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
            cause="; ".join(f"{reason}: {count:,}" for reason, count in sorted(pool.unusable.items())),
            remedy="name a stage with other rows in `few_shot.examples`: one question per row, with a response",
        )
    return pool


def _dropped_entry(row: Row) -> dict[str, Any]:
    return {"id": row["id"], "source": row["source"], "line": row["line"], "rule": "held out"}


def _validate_counts(
    context: StageContext, stage: Augment, counts: AugmentCounts, total: int, written: int, dropped: int
) -> None:
    """Raises RowCountError if rows are missing, and StageError if no row was augmented as requested."""
    unchanged = counts.unchanged.total()
    if total != counts.augmented + unchanged + dropped or counts.rows_in != total:
        raise RowCountError(
            context.name,
            f"{total} input rows; {counts.augmented} were augmented, {unchanged} are unchanged, {dropped} are held out",
        )
    expected = counts.augmented * (stage.copies + stage.originals) - counts.repeated + unchanged
    if written != expected:
        raise RowCountError(context.name, f"{expected} rows were built, {written} written")
    if not counts.augmented:
        reasons = Counter({"held out": dropped, **counts.unchanged})
        raise StageError(
            context.name,
            f"no row of {total:,} can be augmented",
            cause="; ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items()) if count),
            remedy="use rows with questions, and hold out other rows",
        )
    if stage.chain_of_thought is not None and not counts.forms["reasoned"] + counts.forms["direct"]:
        raise StageError(
            context.name,
            f"no response contains reasoning, `{stage.chain_of_thought.separator}` and a final answer",
            cause=f"{counts.augmented:,} rows were checked",
            remedy="set the separator to the one in the responses, or remove `chain_of_thought`",
        )

"""Funnels in the report: rows of each dataset that are read, readable, kept by filters and used by trainings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tunery.events.formatting import as_number, count
from tunery.events.run_state import RunState, StageState
from tunery.events.stage_summary import usable_rows
from tunery.reporting.funnel_timeline import Level, funnel_chart, lost_note
from tunery.reporting.tables import Figure
from tunery.spec import STAGE_KINDS, TRAINERS


def funnels(state: RunState) -> list[Figure]:
    """For each dataset: rows read, readable, and kept by each downstream select stage."""
    figures = []
    for stage in state.stages.values():
        if stage.kind != "dataset" or as_number(stage.facts.get("rows")) is None:
            continue
        levels = list(funnel_levels(state.stages.values(), stage))
        corrupted = any(level.corrupted for level in levels)
        keys = [("good", "rows"), ("bad", "corrupted rows")] if corrupted else []
        source = str(stage.facts.get("source") or "")
        figures.append(Figure(stage.name, funnel_chart(levels), note=source, keys=keys))
    return figures


def funnel_levels(stages: Iterable[StageState], dataset: StageState) -> Iterator[Level]:
    """Rows read, readable, kept by each downstream select of `stages`, and used by each training that skips or
    truncates some; in the order of the file."""
    rows, quarantined = (
        as_number(dataset.facts.get("rows")) or 0,
        as_number(dataset.facts.get("quarantined")) or 0,
    )
    kinds = dataset.facts.get("injected_corruption")
    corrupted = sum(as_number(n) or 0 for kind, n in kinds.items() if kind) if isinstance(kinds, Mapping) else 0
    yield Level("read", rows + quarantined, corrupted=corrupted)
    if quarantined:
        yield Level("readable", rows, f"−{count(quarantined)} quarantined", corrupted)
    depths, sizes = {dataset.name: 0}, {dataset.name: (rows, corrupted)}
    for stage in stages:
        parents = [name for name in stage.inputs if name in depths]
        before, kept = as_number(stage.facts.get("rows_in")), as_number(stage.facts.get("kept"))
        if stage.kind in TRAINERS:
            yield from _used_levels(stage, depths, sizes)
            continue
        # `augment` outputs new rows, often more than it reads, so it is no level of a funnel.
        kind = STAGE_KINDS.get(stage.kind)
        excluded = stage.kind == "augment" or (kind is not None and kind.config.output_type == "metrics")
        if not parents or excluded or (before is None and kept is None):
            continue
        depths[stage.name] = depths[parents[0]] + (kept is not None)
        sizes[stage.name] = sizes[parents[0]]
        if kept is not None:
            counts = stage.facts.get("injected_corruption")
            total, dropped = (
                (as_number(counts.get(key)) or 0) if isinstance(counts, Mapping) else 0 for key in ("total", "dropped")
            )
            sizes[stage.name] = (kept, total - dropped)
            yield Level(
                f"kept by {stage.name}",
                kept,
                lost_note(before or kept, kept),
                total - dropped,
                depths[stage.name] - 1,
            )


def _used_levels(
    stage: StageState, depths: Mapping[str, int], sizes: Mapping[str, tuple[float, float]]
) -> Iterator[Level]:
    """A level for each stage whose rows the training reads. Omitted if all of its rows are used unchanged, and if
    corruption was injected: the number of corrupted rows among the unusable ones is not recorded."""
    mixture = stage.facts.get("mixture")
    data = next(iter(stage.inputs), "")  # `data` is the first field that names stages; others are models and eval_data
    facts = mixture if isinstance(mixture, Mapping) else {data: stage.facts}
    for name, stats in facts.items():
        usable = usable_rows(stats)
        if usable is None or not usable.reasons or sizes.get(name) != (usable.rows, 0):
            continue
        note = ", ".join(part for part in (lost_note(usable.rows, usable.used), usable.reasons) if part)
        yield Level(f"used by {stage.name}", usable.used, note, depth=depths[name])

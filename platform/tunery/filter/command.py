"""`tunery filter`: from what was asked to an experiment, its run, and the rows as files."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tunery.data.export import Written, check_ending, export_dropped, export_kept
from tunery.data.read import first_shape
from tunery.data.sources import BadSource
from tunery.errors import RequestError, RowsLost
from tunery.filter.experiment import KEPT, MARKER, ROWS, SCORED, Asked, Built, build, dataset
from tunery.filter.grammar import said
from tunery.spec import Dataset, load
from tunery.store import Artifact, Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Filtered:
    """What became of the rows."""

    read: int
    quarantined: int
    kept: int
    dropped: int
    by_rule: list[tuple[str, int]]
    """How many each rule dropped, the first that did; empty where a row is dropped by all of them together."""
    out: Path
    dropped_out: Path | None
    experiment: Path
    report: Path
    quarantines: list[Path]
    chosen: list[str]
    """What was chosen without being asked for; said before the run."""
    notes: list[str]
    """What is to be known about the files."""

    def as_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "quarantined": self.quarantined,
            "kept": self.kept,
            "dropped": self.dropped,
            "dropped_by_rule": dict(self.by_rule),
            "out": str(self.out),
            "dropped_out": None if self.dropped_out is None else str(self.dropped_out),
            "experiment": str(self.experiment),
            "report": str(self.report),
            "quarantine": [str(path) for path in self.quarantines],
            "chosen": self.chosen,
            "notes": self.notes,
        }


def run_filter(asked: Asked, dropped: Path | None, store: Store, *, quiet: bool, say: Say) -> Filtered:
    """Write the experiment, run it, and export its rows. Raises RequestError before anything is written where the
    words can't be meant, and whatever loader, check and run raise."""
    from tunery.live import run_live
    from tunery.run import check_all

    _check_files(asked, dropped)
    built = build(asked, answers=_has_answers(asked))
    for note in built.notes:
        say(note)
    write_experiment(asked.file, built.text)
    experiment, source = load(asked.file)
    told = run_live(check_all(experiment, source, store), source, store, quiet=quiet)
    made = told.artifacts
    selection, filtered = made[KEPT], made.get(SCORED, made[ROWS])
    written = export_kept(selection.path, filtered.path, asked.out)
    counts = [(written.rows, selection.facts["kept"])]
    exports = [(asked.out, written)]
    if dropped is not None:
        exports.append((dropped, export_dropped(selection.path, filtered.path, dropped)))
        counts.append((exports[-1][1].rows, selection.facts["dropped"]))
    if any(found != expected for found, expected in counts):
        raise RowsLost(KEPT, f"rows written and rows selected differ: {counts}")
    return _summary(asked, dropped, built, made, told.report, [line for item in exports for line in _said(*item)])


def write_experiment(path: Path, text: str) -> None:
    """Aside and renamed. Raises RequestError rather than overwrite what somebody else wrote."""
    try:
        before = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        before = MARKER
    except OSError as error:
        raise _unwritable(path, error) from error
    if before != text and before.split("\n", 1)[0].rstrip("\r") != MARKER:
        raise RequestError(
            f"{path} is there already, and is not ours to overwrite",
            cause="a filter's experiment is written beside its output, under the same name",
            remedy="give --out another name, or move that file away",
        )
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            aside.unlink()


def _unwritable(path: Path, error: OSError) -> RequestError:
    return RequestError(
        f"the experiment {path} can't be written",
        cause=error.strerror or str(error),
        remedy="give --out another place: the experiment is written beside it",
    )


def _check_files(asked: Asked, dropped: Path | None) -> None:
    check_ending(asked.out, "--out")
    outs = [("--out", asked.out)]
    if dropped is not None:
        check_ending(dropped, "--dropped")
        outs.append(("--dropped", dropped))
        if dropped.absolute() == asked.out.absolute():
            raise RequestError(f"--out and --dropped are both {dropped}", remedy="give them two names")
    for option, out in outs:
        if out.is_dir():
            raise RequestError(f"`{option} {out}` is a folder", remedy="name a file in it")
        for source in asked.sources:
            if _holds(source, out):
                raise RequestError(
                    f"`{option} {out}` lies in the source `{source}`",
                    cause="the filter would read its own output when the command is given again",
                    remedy="write it to another folder",
                )


def _holds(source: str, out: Path) -> bool:
    if "://" in source or source.startswith(("builtin:", "hub:")):
        return False
    place, target = Path(source).expanduser().resolve(), out.resolve()
    if place == target or (place.is_dir() and place in target.parents):
        return True
    return not place.exists() and fnmatch.fnmatch(str(target), str(place))


def _has_answers(asked: Asked) -> bool:
    """Of the first row; where there is none, the checks before the run say what is wrong with the source."""
    with suppress(BadSource, ValueError):
        stage = Dataset.model_validate(dataset(asked, asked.sources))
        return first_shape(stage, asked.file.parent) != "prompt"
    return True


def _said(path: Path, written: Written) -> list[str]:
    notes = []
    if written.guarded:
        notes.append(
            f"{path}: {written.guarded:,} cells begin with ' now, for spreadsheets would take them for formulas; "
            "in .jsonl, .xlsx and .parquet they are as they were"
        )
    if written.replaced:
        notes.append(f"{path}: in {written.replaced:,} cells characters were replaced that a workbook can't hold")
    return notes


def _summary(
    asked: Asked,
    dropped: Path | None,
    built: Built,
    made: Mapping[str, Artifact],
    report: Path,
    notes: list[str],
) -> Filtered:
    rows, facts = made[ROWS].facts, made[KEPT].facts
    losing = [made[name] for name in (ROWS, SCORED) if name in made and made[name].facts["quarantined"]]
    alone = facts["combine"] == "all" or len(facts["rules"]) == 1
    return Filtered(
        read=rows["rows"] + rows["quarantined"],
        quarantined=sum(artifact.facts["quarantined"] for artifact in losing),
        kept=facts["kept"],
        dropped=facts["dropped"],
        by_rule=[
            # As the command line has them.
            (said(score, rule), told["dropped"])
            for (score, rule), told in zip(built.keep.items(), facts["rules"], strict=True)
        ]
        if alone
        else [],
        out=asked.out,
        dropped_out=dropped,
        experiment=asked.file,
        report=report,
        quarantines=[artifact.path / "quarantine.jsonl" for artifact in losing],
        chosen=built.notes,
        notes=notes,
    )


def render(filtered: Filtered) -> Group:
    """The small table at the end."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows read", f"{filtered.read:,}")
    if filtered.quarantined:
        table.add_row("quarantined", f"{filtered.quarantined:,}")
    for rule, count in filtered.by_rule:
        table.add_row(f"dropped by {rule}", f"{count:,}")
    if not filtered.by_rule:
        table.add_row("dropped by all rules", f"{filtered.dropped:,}")
    table.add_row("kept", f"{filtered.kept:,}")
    places = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    places.add_column(no_wrap=True)
    places.add_column(overflow="fold")
    places.add_row("kept rows", str(filtered.out))
    if filtered.dropped_out is not None:
        places.add_row("dropped rows", str(filtered.dropped_out))
    for path in filtered.quarantines:
        places.add_row("quarantine", str(path))
    places.add_row("experiment", f"{filtered.experiment} (tunery run does the same)")
    return Group(Text(), table, Text(), places, *(Text(f"note: {note}") for note in filtered.notes))

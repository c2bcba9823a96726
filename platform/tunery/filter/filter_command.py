"""`tunery filter`: build an experiment from the command line, run it, and write its rows to files."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tunery.errors import RequestError, StageError
from tunery.filter.filter_checks import check_models, check_sources, command_line_errors
from tunery.filter.filter_experiment import KEPT, MARKER, ROWS, SCORED, Built, FilterRequest, build, dataset_here
from tunery.filter.grammar import said, score_of
from tunery.filter.outputs import Counts, Outputs, check_ending, write_outputs
from tunery.filter.row_decisions import Artifacts, RowDecisions
from tunery.ingest.read import first_shape
from tunery.ingest.sources import BadSource, source_identity
from tunery.run import check_all
from tunery.selection.select_stage import NothingPasses
from tunery.spec import Dataset, parse
from tunery.spec.yaml_source import read_yaml
from tunery.store import Artifact, Store
from tunery.store.artifacts import input_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class FilterOutcome:
    """Result of a filter run: row counts, output files and notes."""

    read: int
    quarantined: int
    kept: int
    dropped: int
    by_rule: list[tuple[str, int]]
    """(rule, number of rows that it dropped); a row counts for the first rule that drops it. Empty if several rules are
    combined by `--any`, where only all rules together drop a row."""
    out: Path
    dropped_out: Path | None
    experiment: Path
    report: Path
    quarantines: list[Path]
    chosen: list[str]
    """Defaults that were used; printed before the run."""
    score_columns: dict[str, str]
    """Column in the output files by score; empty if no scores are requested."""
    notes: list[str]
    """Remarks on the output files."""

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
            "score_columns": self.score_columns,
            "notes": self.notes,
        }


def run_filter(asked: FilterRequest, dropped: Path | None, store: Store, *, quiet: bool, say: Say) -> FilterOutcome:
    """Write the experiment, run it, and write its rows. Raises RequestError before anything is written if the command
    line is invalid, and the errors of a run."""
    from tunery.live import run_live

    _check_files(asked, dropped)
    check_sources(asked)
    built = build(asked, answers=_has_answers(asked))
    check_models(built)
    with _parent_of(asked.file), command_line_errors(asked, built):
        source = read_yaml(built.text, str(asked.file))
        experiment = check_all(parse(source), source, store)
        write_experiment(asked.file, built.text)
    for note in built.notes:
        say(note)
    stage, folder = experiment.stages[ROWS], asked.file.parent
    assert isinstance(stage, Dataset), "build wrote it"
    files = RowFiles(asked, dropped, built, stage, source_identity(stage, folder))
    with command_line_errors(asked, built):
        with files.dropped_if_none_kept(say):
            summary = run_live(experiment, source, store, quiet=quiet)
        written = files.write(summary.artifacts)
    return _summary(asked, dropped, built, summary.artifacts, summary.report, written)


@dataclass(frozen=True)
class RowFiles:
    """Writes the output files of a filter from the artifacts of its run."""

    asked: FilterRequest
    dropped: Path | None
    built: Built
    stage: Dataset
    """The stage that reads the sources."""
    identity: Any
    """Identity of the sources before the run."""

    def write(self, made: Mapping[str, Artifact]) -> Outputs:
        """Write the output files from the artifacts of a completed run."""
        kept = made[KEPT]
        return self._write(made, kept.path, kept.facts["kept"], kept.facts["dropped"])

    @contextmanager
    def dropped_if_none_kept(self, say: Say) -> Iterator[None]:
        """Context manager around a run, which fails if no row passes: write the file of dropped rows, which has the
        reasons, before the error is raised again."""
        try:
            yield
        except NothingPasses as error:
            if self.dropped is None:
                raise
            scored = error.data if error.data.kind == "score" else None
            made = {ROWS: input_of(scored, "data"), SCORED: scored} if scored else {ROWS: error.data}
            written = self._write(made, error.out, 0, error.rows)
            for note in _notes(self.asked, self.dropped, written):
                say(note)
            remedy = f"{error.remedy}, and why each row was dropped is in {self.dropped}"
            raise StageError(error.stage, error.message, cause=error.cause, remedy=remedy) from error

    def _write(self, made: Mapping[str, Artifact], selection: Path, kept: int, dropped: int) -> Outputs:
        """`selection`: folder of the select stage's dropped.jsonl."""
        scored = made.get(SCORED)
        names = [name for scorer in self.built.by if (name := score_of(scorer))]
        artifacts = Artifacts(made[ROWS].path, scored.path if scored else None, selection)
        return write_outputs(
            self.stage,
            self.asked.file.parent,
            RowDecisions(artifacts, names, _rules_said(self.built)),
            Counts(kept, dropped, _quarantined(made)),
            out=self.asked.out,
            dropped=self.dropped,
            scores=names if self.asked.scores else (),
            identity=self.identity,
        )


def _rules_said(built: Built) -> dict[str, tuple[str, list[str]]]:
    """Map the rule names of the select stage to (rule as on the command line, scores that it uses). With `--any`, a row
    is dropped by all rules together, whose names are joined."""
    rules = built.described
    single = {rule: (words, [score]) for (rule, words), score in zip(rules.items(), built.keep, strict=True)}
    return {**single, " and ".join(rules): (" and ".join(rules.values()), list(built.keep))}


def _quarantined(made: Mapping[str, Artifact]) -> int:
    return sum(made[name].facts["quarantined"] for name in (ROWS, SCORED) if name in made)


@contextmanager
def _parent_of(path: Path) -> Iterator[None]:
    """Create the missing folders of a file; remove them again if the request is invalid."""
    missing = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    except RequestError:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


def write_experiment(path: Path, text: str) -> None:
    """Write the experiment under a temporary name and rename it. Raises RequestError instead of overwriting a file that
    `tunery filter` did not write."""
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


def _check_files(asked: FilterRequest, dropped: Path | None) -> None:
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


def _has_answers(asked: FilterRequest) -> bool:
    """Whether the first row has a response; True if it can't be read."""
    with suppress(BadSource):
        return first_shape(dataset_here(asked, asked.sources), Path.cwd()) != "prompt"
    return True


def _notes(asked: FilterRequest, dropped: Path | None, outputs: Outputs) -> list[str]:
    files = [(asked.out, outputs.kept)]
    if dropped is not None and outputs.dropped is not None:
        files.append((dropped, outputs.dropped))
    notes = []
    for path, written in files:
        if written.guarded:
            notes.append(
                f"{path}: {written.guarded:,} cells begin with ' now, for spreadsheets would take them for formulas; "
                "in .jsonl, .xlsx and .parquet they are as they were"
            )
        if written.replaced:
            notes.append(f"{path}: in {written.replaced:,} cells characters were replaced that a workbook can't hold")
    for score, name in outputs.added.scores.items():
        if name != score:
            notes.append(f"the rows have a column `{score}`: the score is in `{name}`")
    return notes


def _summary(
    asked: FilterRequest,
    dropped: Path | None,
    built: Built,
    made: Mapping[str, Artifact],
    report: Path,
    written: Outputs,
) -> FilterOutcome:
    rows, facts = made[ROWS].facts, made[KEPT].facts
    losing = [made[name] for name in (ROWS, SCORED) if name in made and made[name].facts["quarantined"]]
    alone = facts["combine"] == "all" or len(facts["rules"]) == 1
    return FilterOutcome(
        read=rows["rows"] + rows["quarantined"],
        quarantined=_quarantined(made),
        kept=facts["kept"],
        dropped=facts["dropped"],
        by_rule=[
            # Rules as on the command line.
            (said(score, rule), stats["dropped"])
            for (score, rule), stats in zip(built.keep.items(), facts["rules"], strict=True)
        ]
        if alone
        else [],
        out=asked.out,
        dropped_out=dropped,
        experiment=asked.file,
        report=report,
        quarantines=[artifact.path / "quarantine.jsonl" for artifact in losing],
        chosen=built.notes,
        score_columns=written.added.scores,
        notes=_notes(asked, dropped, written),
    )


def render(filtered: FilterOutcome) -> Group:
    """Build the summary that is printed after a run."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows read", f"{filtered.read:,}")
    if filtered.quarantined:
        table.add_row("quarantined (can't be read, used or scored)", f"{filtered.quarantined:,}")
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
        title = "dropped and quarantined rows" if filtered.quarantined else "dropped rows"
        places.add_row(title, str(filtered.dropped_out))
    else:
        for path in filtered.quarantines:
            places.add_row("quarantined rows", str(path))
    places.add_row("experiment", f"{filtered.experiment} (`tunery run` scores and selects as it says)")
    return Group(Text(), table, Text(), places, *(Text(f"note: {note}") for note in filtered.notes))

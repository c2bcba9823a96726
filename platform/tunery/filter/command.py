"""`tunery filter`: from the command line to an experiment, its run, and the rows as files."""

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

from tunery.data.read import first_shape
from tunery.data.select.stage import NothingPasses
from tunery.data.sources import BadSource, source_identity
from tunery.errors import RequestError, StageError
from tunery.filter.check import check_models, check_sources, command_line_errors
from tunery.filter.experiment import KEPT, MARKER, ROWS, SCORED, Asked, Built, build, dataset_here
from tunery.filter.grammar import said, score_of
from tunery.filter.outputs import Counts, Outputs, check_ending, write_outputs
from tunery.filter.verdicts import Artifacts, Verdicts
from tunery.run import check_all
from tunery.spec import Dataset, parse
from tunery.spec.yaml_source import read_yaml
from tunery.store import Artifact, Store
from tunery.store.artifacts import input_of

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
    score_columns: dict[str, str]
    """By score: its column in the files; empty where none are requested."""
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
            "score_columns": self.score_columns,
            "notes": self.notes,
        }


def run_filter(asked: Asked, dropped: Path | None, store: Store, *, quiet: bool, say: Say) -> Filtered:
    """Write the experiment, run it, and write its rows. Raises RequestError before anything is written where the
    command line is wrong, in its words; and whatever a run raises."""
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
            told = run_live(experiment, source, store, quiet=quiet)
        written = files.write(told.artifacts)
    return _summary(asked, dropped, built, told.artifacts, told.report, written)


@dataclass(frozen=True)
class RowFiles:
    """The files that a filter writes, and what they are written from besides the run's artifacts."""

    asked: Asked
    dropped: Path | None
    built: Built
    stage: Dataset
    """It reads the sources."""
    identity: Any
    """Of the sources before the run."""

    def write(self, made: Mapping[str, Artifact]) -> Outputs:
        """Both, from the artifacts of a run."""
        kept = made[KEPT]
        return self._write(made, kept.path, kept.facts["kept"], kept.facts["dropped"])

    @contextmanager
    def dropped_if_none_kept(self, say: Say) -> Iterator[None]:
        """Around a run, which ends with an error where no row passes: before that the file of dropped rows is written,
        since it shows why."""
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
        """`selection`: the folder of the select stage's dropped.jsonl."""
        scored = made.get(SCORED)
        names = [name for scorer in self.built.by if (name := score_of(scorer))]
        artifacts = Artifacts(made[ROWS].path, scored.path if scored else None, selection)
        return write_outputs(
            self.stage,
            self.asked.file.parent,
            Verdicts(artifacts, names, _rules_said(self.built)),
            Counts(kept, dropped, _quarantined(made)),
            out=self.asked.out,
            dropped=self.dropped,
            scores=names if self.asked.scores else (),
            identity=self.identity,
        )


def _rules_said(built: Built) -> dict[str, tuple[str, list[str]]]:
    """By a rule as the select stage has it: as the command line has it, and the scores that it looks at. Where any rule
    is enough to pass, a row is dropped by all of them together."""
    rules = built.described
    single = {rule: (words, [score]) for (rule, words), score in zip(rules.items(), built.keep, strict=True)}
    return {**single, " and ".join(rules): (" and ".join(rules.values()), list(built.keep))}


def _quarantined(made: Mapping[str, Artifact]) -> int:
    return sum(made[name].facts["quarantined"] for name in (ROWS, SCORED) if name in made)


@contextmanager
def _parent_of(path: Path) -> Iterator[None]:
    """The file's folder, built where it is missing; removed again where the request is wrong."""
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
    """Of the first row."""
    with suppress(BadSource):
        return first_shape(dataset_here(asked, asked.sources), Path.cwd()) != "prompt"
    return True


def _notes(asked: Asked, dropped: Path | None, outputs: Outputs) -> list[str]:
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
    asked: Asked,
    dropped: Path | None,
    built: Built,
    made: Mapping[str, Artifact],
    report: Path,
    written: Outputs,
) -> Filtered:
    rows, facts = made[ROWS].facts, made[KEPT].facts
    losing = [made[name] for name in (ROWS, SCORED) if name in made and made[name].facts["quarantined"]]
    alone = facts["combine"] == "all" or len(facts["rules"]) == 1
    return Filtered(
        read=rows["rows"] + rows["quarantined"],
        quarantined=_quarantined(made),
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
        score_columns=written.added.scores,
        notes=_notes(asked, dropped, written),
    )


def render(filtered: Filtered) -> Group:
    """The small table at the end."""
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

"""`tunery filter`: generate an experiment from the command line, run it, and write its rows to files."""

from __future__ import annotations

import fnmatch
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
from tunery.filter.filter_experiment import (
    KEPT,
    MARKER,
    ROWS,
    SCORED,
    FilterRequest,
    GeneratedExperiment,
    dataset_from_cwd,
    generate_experiment,
)
from tunery.filter.grammar import format_rule, score_of
from tunery.filter.outputs import Counts, Outputs, check_ending, write_outputs
from tunery.filter.row_decisions import Artifacts, RowDecisions
from tunery.ingest.read import first_row_format
from tunery.ingest.sources import BadSource, source_identity
from tunery.run import validate_experiment
from tunery.selection.select_stage import NothingPasses
from tunery.spec import Dataset, parse
from tunery.spec.yaml_source import read_yaml
from tunery.store import Artifact, Store
from tunery.store.artifacts import input_of
from tunery.store.atomic_write import write_text

Notify = Callable[[str], None]


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
    defaults: list[str]
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
            "defaults": self.defaults,
            "score_columns": self.score_columns,
            "notes": self.notes,
        }


def run_filter(
    request: FilterRequest, dropped: Path | None, store: Store, *, quiet: bool, notify: Notify
) -> FilterOutcome:
    """Write the experiment, run it, and write its rows. Raises RequestError before anything is written if the command
    line is invalid, and the errors of a run."""
    from tunery.live import run_live

    _check_files(request, dropped)
    check_sources(request)
    generated = generate_experiment(request, has_responses=_has_responses(request))
    check_models(generated)
    with _parent_of(request.file), command_line_errors(request, generated):
        source = read_yaml(generated.text, str(request.file))
        experiment = validate_experiment(parse(source), source, store)
        write_experiment(request.file, generated.text)
    for note in generated.notes:
        notify(note)
    stage, folder = experiment.stages[ROWS], request.file.parent
    assert isinstance(stage, Dataset), "generate_experiment wrote it"
    files = RowFiles(request, dropped, generated, stage, source_identity(stage, folder))
    with command_line_errors(request, generated):
        with files.dropped_if_none_kept(notify):
            summary = run_live(experiment, source, store, quiet=quiet)
        outputs = files.write(summary.artifacts)
    return _summary(request, dropped, generated, summary.artifacts, summary.report, outputs)


@dataclass(frozen=True)
class RowFiles:
    """Writes the output files of a filter from the artifacts of its run."""

    request: FilterRequest
    dropped: Path | None
    generated: GeneratedExperiment
    stage: Dataset
    """The stage that reads the sources."""
    identity: Any
    """Identity of the sources before the run."""

    def write(self, artifacts: Mapping[str, Artifact]) -> Outputs:
        """Write the output files from the artifacts of a completed run."""
        kept = artifacts[KEPT]
        return self._write(artifacts, kept.path, kept.facts["kept"], kept.facts["dropped"])

    @contextmanager
    def dropped_if_none_kept(self, notify: Notify) -> Iterator[None]:
        """Context manager around a run, which fails if no row passes: write the file of dropped rows, which has the
        reasons, before the error is raised again."""
        try:
            yield
        except NothingPasses as error:
            if self.dropped is None:
                raise
            scored = error.data if error.data.kind == "score" else None
            artifacts = {ROWS: input_of(scored, "data"), SCORED: scored} if scored else {ROWS: error.data}
            outputs = self._write(artifacts, error.out, 0, error.rows)
            for note in _notes(self.request, self.dropped, outputs):
                notify(note)
            remedy = f"{error.remedy}; {self.dropped} has the reason for each row"
            raise StageError(error.stage, error.message, cause=error.cause, remedy=remedy) from error

    def _write(self, artifacts: Mapping[str, Artifact], selection: Path, kept: int, dropped: int) -> Outputs:
        """`selection`: folder of the select stage's dropped.jsonl."""
        scored = artifacts.get(SCORED)
        names = [name for scorer in self.generated.by if (name := score_of(scorer))]
        folders = Artifacts(artifacts[ROWS].path, scored.path if scored else None, selection)
        return write_outputs(
            self.stage,
            self.request.file.parent,
            RowDecisions(folders, names, _rules_by_name(self.generated)),
            Counts(kept, dropped, _quarantined(artifacts)),
            out=self.request.out,
            dropped=self.dropped,
            scores=names if self.request.scores else (),
            identity=self.identity,
        )


def _rules_by_name(generated: GeneratedExperiment) -> dict[str, tuple[str, list[str]]]:
    """Map the rule names of the select stage to (rule as on the command line, scores that it uses). With `--any`, a row
    is dropped by all rules together, whose names are joined."""
    rules = generated.given_rules
    single = {rule: (given, [score]) for (rule, given), score in zip(rules.items(), generated.keep, strict=True)}
    return {**single, " and ".join(rules): (" and ".join(rules.values()), list(generated.keep))}


def _quarantined(artifacts: Mapping[str, Artifact]) -> int:
    return sum(artifacts[name].facts["quarantined"] for name in (ROWS, SCORED) if name in artifacts)


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
            f"{path} exists and was not written by `tunery filter`",
            cause="the experiment of a filter is written next to its output, with the ending .yaml",
            remedy="choose another name for --out, or move that file",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RequestError:
    return RequestError(
        f"the experiment {path} can't be written",
        cause=error.strerror or str(error),
        remedy="choose another --out: the experiment is written next to it",
    )


def _check_files(request: FilterRequest, dropped: Path | None) -> None:
    check_ending(request.out, "--out")
    outs = [("--out", request.out)]
    if dropped is not None:
        check_ending(dropped, "--dropped")
        outs.append(("--dropped", dropped))
        if dropped.absolute() == request.out.absolute():
            raise RequestError(f"--out and --dropped are both {dropped}", remedy="use two different names")
    for option, out in outs:
        if out.is_dir():
            raise RequestError(f"`{option} {out}` is a folder", remedy="name a file in it")
        for source in request.sources:
            if _contains(source, out):
                raise RequestError(
                    f"`{option} {out}` is in the source `{source}`",
                    cause="the filter would read its own output when the command is run again",
                    remedy="write it to another folder",
                )


def _contains(source: str, out: Path) -> bool:
    if "://" in source or source.startswith(("builtin:", "hub:")):
        return False
    source_path, target = Path(source).expanduser().resolve(), out.resolve()
    if source_path == target or (source_path.is_dir() and source_path in target.parents):
        return True
    return not source_path.exists() and fnmatch.fnmatch(str(target), str(source_path))


def _has_responses(request: FilterRequest) -> bool:
    """Whether the first row has a response; True if it can't be read."""
    with suppress(BadSource):
        return first_row_format(dataset_from_cwd(request, request.sources), Path.cwd()) != "prompt"
    return True


def _notes(request: FilterRequest, dropped: Path | None, outputs: Outputs) -> list[str]:
    files = [(request.out, outputs.kept)]
    if dropped is not None and outputs.dropped is not None:
        files.append((dropped, outputs.dropped))
    notes = []
    for path, counts in files:
        if counts.escaped:
            notes.append(
                f"{path}: {counts.escaped:,} cells got a leading ', because spreadsheets would treat them as formulas; "
                ".jsonl, .xlsx and .parquet do not need it"
            )
        if counts.replaced:
            notes.append(f"{path}: replaced characters that a workbook can't contain in {counts.replaced:,} cells")
    for score, name in outputs.added.scores.items():
        if name != score:
            notes.append(f"the score `{score}` is in the column `{name}`, because the rows have a column `{score}`")
    return notes


def _summary(
    request: FilterRequest,
    dropped: Path | None,
    generated: GeneratedExperiment,
    artifacts: Mapping[str, Artifact],
    report: Path,
    outputs: Outputs,
) -> FilterOutcome:
    rows, facts = artifacts[ROWS].facts, artifacts[KEPT].facts
    inputs = [artifacts[name] for name in (ROWS, SCORED) if name in artifacts]
    is_attributable = facts["combine"] == "all" or len(facts["rules"]) == 1
    return FilterOutcome(
        read=rows["rows"] + rows["quarantined"],
        quarantined=_quarantined(artifacts),
        kept=facts["kept"],
        dropped=facts["dropped"],
        by_rule=[
            # Rules as on the command line.
            (format_rule(score, rule), stats["dropped"])
            for (score, rule), stats in zip(generated.keep.items(), facts["rules"], strict=True)
        ]
        if is_attributable
        else [],
        out=request.out,
        dropped_out=dropped,
        experiment=request.file,
        report=report,
        quarantines=[artifact.path / "quarantine.jsonl" for artifact in inputs if artifact.facts["quarantined"]],
        defaults=generated.notes,
        score_columns=outputs.added.scores,
        notes=_notes(request, dropped, outputs),
    )


def render(filtered: FilterOutcome) -> Group:
    """Build the summary that is printed after a run."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows read", f"{filtered.read:,}")
    if filtered.quarantined:
        table.add_row("quarantined (invalid, or scoring failed)", f"{filtered.quarantined:,}")
    for rule, count in filtered.by_rule:
        table.add_row(f"dropped by {rule}", f"{count:,}")
    if not filtered.by_rule:
        table.add_row("dropped by all rules", f"{filtered.dropped:,}")
    table.add_row("kept", f"{filtered.kept:,}")
    files_table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    files_table.add_column(no_wrap=True)
    files_table.add_column(overflow="fold")
    files_table.add_row("kept rows", str(filtered.out))
    if filtered.dropped_out is not None:
        title = "dropped and quarantined rows" if filtered.quarantined else "dropped rows"
        files_table.add_row(title, str(filtered.dropped_out))
    else:
        for path in filtered.quarantines:
            files_table.add_row("quarantined rows", str(path))
    files_table.add_row("experiment", f"{filtered.experiment} (run it with `tunery run`)")
    return Group(Text(), table, Text(), files_table, *(Text(f"note: {note}") for note in filtered.notes))

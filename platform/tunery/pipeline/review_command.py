"""`tunery review`: serve the sample of a review stage as a web page, or write it to a workbook."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import RequestError
from tunery.interrupt import STOP
from tunery.pipeline.cache_keys import fingerprints, stage_seed
from tunery.pipeline.run_context import RunContext
from tunery.review.decisions import DecisionLog, decisions_path, read_decisions
from tunery.review.filter_results import read_filter_results
from tunery.review.review_items import ReviewItem, review_items
from tunery.review.review_session import ReviewSession
from tunery.review.sample import sample_rows
from tunery.review.server import ReviewServer
from tunery.spec import Experiment, Review
from tunery.spec.error_messages import nearest
from tunery.spec.graph import with_upstream
from tunery.spec.yaml_source import YamlSource
from tunery.store import Store

PrintLine = Callable[[str], None]


@dataclass(frozen=True)
class PendingReview:
    """A review stage whose input rows are selected, with the sample to review."""

    stage: str
    rows: list[ReviewItem]
    decisions: Path
    context: RunContext


def find_review(experiment: Experiment, source: YamlSource, store: Store, name: str) -> PendingReview:
    """Return the review stage `name` with its sample. Raises RequestError if there is no such stage, or if the store
    has no artifact of the select stage whose rows it reviews."""
    context = RunContext(store, store.run(experiment.name), Path(source.file))
    stage = experiment.stages.get(name)
    if not isinstance(stage, Review):
        reviews = [other for other, stage in experiment.stages.items() if isinstance(stage, Review)]
        remedy = "add one: `checked: {kind: review, data: <a select stage>, decisions: decisions/checked.jsonl}`"
        raise RequestError(
            f"`{name}` is not a review stage of {source.file}",
            cause="" if stage is None else f"it is a {stage.kind} stage",
            remedy=nearest(name, reviews) if reviews else remedy,
        )
    # Only the upstream stages: the files of other stages need not exist to review these rows.
    needed = experiment.model_copy(update={"stages": with_upstream(experiment.stages, [stage.data])})
    selection = store.find("select", fingerprints(needed, context.folder)[stage.data])
    if selection is None:
        raise RequestError(
            f"the rows of `{stage.data}` aren't selected yet, so there is nothing to review",
            cause=f"the store {store.root} has no artifact of `{stage.data}` for the current {source.file}",
            remedy=f"run `{context.command('run')}` first: it builds `{stage.data}` and stops at `{name}`",
        )
    filtered = read_filter_results(selection)
    sample = sample_rows(filtered.ids, filtered.sources, filtered.distance, stage.rows, stage_seed(stage, experiment))
    return PendingReview(name, review_items(filtered, sample), decisions_path(stage, context.folder), context)


def write_review(pending: PendingReview, path: Path, *, show_filter: bool, print_line: PrintLine) -> None:
    """Write the rows and the existing decisions to a workbook at `path`. Raises RequestError if the file exists or does
    not end in .xlsx."""
    from tunery.review.workbook import write_workbook

    if path.suffix != ".xlsx":
        raise RequestError(f"{path} is not a workbook's file name", remedy="use a name that ends in .xlsx")
    if path.exists():
        raise RequestError(
            f"{path} exists", cause="it may contain decisions", remedy="use another name, or move the file"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    decided = read_decisions(pending.decisions)
    write_workbook(path, pending.rows, decided, show_filter=show_filter)
    folder = pending.context.folder.absolute()
    absolute = path.absolute()
    relative = absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute
    print_line(f"{path}: {len(pending.rows)} rows to decide on, in the column `decision`")
    if absolute != pending.decisions.absolute():
        print_line(f"to use it: write `decisions: {relative}` in the stage `{pending.stage}`")
    print_line(f"then: {pending.context.command('run')}")


def serve_review(pending: PendingReview, *, port: int, show_filter: bool, browser: bool, print_line: PrintLine) -> None:
    """Serve the rows as a web page until Ctrl-C. Each decision is written to the decisions file immediately. Raises
    RequestError if that file is a workbook."""
    if pending.decisions.suffix == ".xlsx":
        raise RequestError(
            f"the page can't write decisions to {pending.decisions}",
            cause="it appends one line per decision to a .jsonl file",
            remedy="set `decisions` to a .jsonl file, or write a workbook with --xlsx and decide there",
        )
    log = DecisionLog(pending.decisions)
    try:
        session = ReviewSession(
            pending.stage, pending.rows, log, next_command=pending.context.command("run"), show_filter=show_filter
        )
        with ReviewServer(session, port) as server:
            print_line(f"{pending.stage}: {session.decided} of {session.total} rows are decided")
            print_line(f"review them at {server.url}")
            print_line(f"each decision is saved immediately to {pending.decisions}; stop with Ctrl-C")
            with tempfile.TemporaryDirectory(prefix="tunery-review-") as folder:
                if browser and _has_screen():
                    _open_browser(server.url, Path(folder))
                try:
                    server.serve_forever(poll_interval=0.2)
                except KeyboardInterrupt:
                    STOP.forget()
                    print_line("")  # ends the line of the ^C printed by the terminal
        left = session.total - session.decided
        print_line(f"{session.decided} of {session.total} rows are decided" + (f"; {left} are left" if left else ""))
        if left:
            print_line(f"to continue: {pending.context.command('review', pending.stage)}")
        if session.decided:
            print_line(f"to use the decisions: {pending.context.command('run')}")
    finally:
        log.close()


def _open_browser(url: str, folder: Path) -> None:
    """Open `url` through a page in the private `folder`: all users of the machine can read the command line of the
    browser, and the address has the token."""
    page = folder / "review.html"
    page.write_text(f'<meta http-equiv="refresh" content="0; url={url}">')
    webbrowser.open(page.as_uri())


def _has_screen() -> bool:
    """Whether there is a graphical display. Without one, `webbrowser` would start a text browser in this terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))

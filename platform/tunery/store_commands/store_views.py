"""Texts of the commands `store ls`, `store verify` and `store gc`.

Lines are formatted here and not by rich, which takes half a minute for a table of 100,000 rows.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from tunery.events.formatting import count, duration, size
from tunery.store import DEFAULT_STORE
from tunery.store_commands.artifact_list import ArtifactList, ListedArtifact
from tunery.store_commands.garbage_collection import GcResult, Removal
from tunery.store_commands.integrity import Progress, Verification, VerifiedArtifact

SHORT_FINGERPRINT = 8
"""Number of its 16 digits that `ls` shows; `verify` accepts them."""
MAX_FILES = 5
"""Number of files of a damaged artifact that `verify` names."""
POLL_SECONDS = 0.2
LINE_SECONDS = 10.0
"""Interval of progress lines where standard error is not a terminal."""
NO_RUN = "-"


# ls.


def list_lines(listing: ArtifactList, width: int | None) -> Iterator[str]:
    """Yield a line per artifact. `width`: of the terminal, to which the names of runs are shortened; None to show all,
    with complete fingerprints."""
    digits = SHORT_FINGERPRINT if width else None
    header = ("kind", "fingerprint", "size", "age")
    rows = [header, *(_row(artifact, listing.now, digits) for artifact in listing.artifacts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    kind, fingerprint, bytes_, age = widths
    for row, runs in zip(rows, [("runs",), *(artifact.runs for artifact in listing.artifacts)], strict=True):
        start = f"{row[0]:<{kind}}  {row[1]:<{fingerprint}}  {row[2]:>{bytes_}}  {row[3]:>{age}}  "
        yield start + (names_in_width(runs, width - len(start)) if width else ", ".join(runs) or NO_RUN)
    unused = [artifact for artifact in listing.artifacts if not artifact.runs]
    yield f"{_artifacts(len(listing.artifacts))}, {size(listing.bytes)} in {listing.store}"
    if unused:
        freed = size(sum(artifact.bytes for artifact in unused))
        yield f"{_artifacts(len(unused))} ({freed}) without a run: `{_command('gc --dry-run', listing.store)}`"


def _row(artifact: ListedArtifact, now: float, digits: int | None) -> tuple[str, ...]:
    age = duration(max(0.0, now - artifact.created)) if now - artifact.created >= 60 else "<1m"
    return artifact.kind, artifact.fingerprint[:digits], size(artifact.bytes), age


def names_in_width(names: Sequence[str], width: int) -> str:
    """Return as many names as fit, and the number of the others: `first, second, +3`. A first name that does not fit
    ends in an ellipsis."""
    if not names:
        return NO_RUN
    for shown in range(min(len(names), width), 0, -1):
        text = ", ".join([*names[:shown], *([f"+{len(names) - shown}"] if shown < len(names) else [])])
        if len(text) <= width:
            return text
    more = f", +{len(names) - 1}" if len(names) > 1 else ""
    return f"{names[0][: max(1, width - len(more) - 1)]}…{more}"


# verify.


@contextmanager
def verify_progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Show the progress of a verification with the time left: a bar on a terminal, otherwise a line every LINE_SECONDS.
    Yields the function that starts it."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def watch(progress: Progress) -> None:
        show = _show_bar if console.is_terminal else _print_lines
        threads.append(threading.Thread(target=show, args=(console, progress, stop), daemon=True))
        threads[0].start()

    try:
        yield watch
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _show_bar(console: Console, progress: Progress, stop: threading.Event) -> None:
    columns = (TextColumn("verify"), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("verify", total=progress.total)
        while not stop.wait(POLL_SECONDS):
            bar.update(task, completed=progress.done)


def _print_lines(console: Console, progress: Progress, stop: threading.Event) -> None:
    started = time.monotonic()
    while not stop.wait(LINE_SECONDS):
        rate = progress.done / (time.monotonic() - started)
        left = f", {duration((progress.total - progress.done) / rate)} left" if rate else ""
        console.print(f"verified {size(progress.done)} of {size(progress.total)}, {size(rate)}/s{left}")


def verify_lines(verification: Verification) -> list[str]:
    """Return a line per damaged artifact, and the counts."""
    lines = [f"{artifact.path.name}: {'; '.join(_damage(artifact))}" for artifact in verification.damaged]
    without = verification.without_checksums
    if without:
        lines.append(f"no checksums: {_artifacts(len(without))} of earlier versions, which can't be verified")
        lines += [f"  {artifact.path.name}" for artifact in without]
    verified = len(verification.artifacts) - len(without) - len(verification.damaged)
    speed = f" in {duration(verification.seconds)}" if verification.seconds >= 1 else ""
    lines.append(
        f"{_artifacts(verified)} ok, {len(verification.damaged)} damaged; read {size(verification.bytes)}{speed}"
    )
    return lines


def _damage(artifact: VerifiedArtifact) -> Iterator[str]:
    for what in ("unreadable", "missing", "changed", "additional"):
        if files := getattr(artifact, what):
            more = f" and {count(len(files) - MAX_FILES)} more" if len(files) > MAX_FILES else ""
            yield f"{what}: {', '.join(files[:MAX_FILES])}{more}"


# gc.


def gc_lines(result: GcResult) -> Iterator[str]:
    """Yield a line per artifact and work directory that was or would be removed, and the totals."""
    for removal in result.removals:
        if removal.what in ("artifact", "work directory"):
            yield _removal_line(removal, result.store)
    verb = "would be removed" if result.dry_run else "removed"
    yield f"{verb}: {_counts(result.removals)}; {size(result.bytes)} {'would be ' if result.dry_run else ''}freed"
    for path in result.held:
        yield f"kept: {path.relative_to(result.store)}: a process is building it"
    if result.active_runs:
        runs = ", ".join(f"{run} ({owner})" for run, owner in result.active_runs.items())
        yield f"active: {runs}: a run may use any artifact, so none is removed before it ends"
    if result.kept:
        freed = size(sum(removal.bytes for removal in result.kept))
        yield f"then `{_command('gc', result.store)}` removes {_counts(result.kept)}; {freed}"


def _removal_line(removal: Removal, store: Path) -> str:
    return f"{size(removal.bytes):>10}  {removal.path.relative_to(store)}  ({removal.reason})"


def _counts(removals: Sequence[Removal]) -> str:
    counts: Counter[str] = Counter(removal.what for removal in removals)
    plurals = {
        "artifact": "artifacts",
        "work directory": "work directories",
        "lease": "leases",
        "temporary": "temporary files",
    }
    return ", ".join(f"{count(counts[what])} {plurals[what]}" for what in plurals if counts[what]) or "nothing"


def _artifacts(number: int) -> str:
    return f"{count(number)} artifact{'' if number == 1 else 's'}"


def _command(words: str, store: Path) -> str:
    option = "" if store == DEFAULT_STORE.absolute() else f" --store {shlex.quote(str(store))}"
    return f"tunery store {words}{option}"

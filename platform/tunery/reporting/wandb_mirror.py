"""Mirrors the event log to W&B, in one thread of the driver.

Workers never import wandb: there is one writer, the workers need no API key, and ranks do not matter. The actions come
from wandb_translate.py; this module calls wandb. If W&B fails (no network, full disk, a deleted run), the experiment
continues: lost records are counted, and reported once when the mirror is closed.

All files are kept under `<run>/wandb`, including tables that wait for their upload, which wandb would store in the
user's home directory.

After a kill, W&B lacks up to about four seconds of the log: events younger than SETTLE_SECONDS + POLL_SECONDS, and
records that wandb's process had not flushed (FLUSH_SECONDS). The next invocation reads W&B's files (wandb_files.py) and
writes the missing records from the log to another file, under the same run id and with increasing `_step`s; `wandb
sync` appends it to the first. Online, the number of rows on the server decides: rows that are only in a file are sent
again, and rows that were sent but are not in a file are not. Two cases cannot be detected: offline, that a synced file
was deleted before the run ended (`wandb clean`), so that the run is written again; and that the files of an interrupted
offline run are synced only after the run continued online.
"""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunery.events.event_log import Event, EventReader
from tunery.reporting.wandb_files import History, exit_codes, repair_files, stored_rows
from tunery.reporting.wandb_translate import (
    INTERRUPTED,
    Action,
    Finish,
    Log,
    Open,
    Summarize,
    Translator,
    WandbAxis,
    run_id,
)
from tunery.reporting.wandb_values import Histogram, HistoryValue, WandbTable
from tunery.spec import Wandb

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

POLL_SECONDS = 1.0
SETTLE_SECONDS = 2.0
"""Delay before an event is processed, so that a stage's end does not overtake its last point from another file."""
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0
"""Timeouts of wandb calls. After one, the mirror continues offline, and `wandb sync` can upload the runs later."""
CLOSE_SECONDS = 180.0
FLUSH_SECONDS = 1.0
"""Interval at which wandb's process flushes records to its file; wandb's default is 15."""
MAX_CONSECUTIVE_FAILURES = 3
"""Consecutive runs that cannot be opened, not even offline, before the mirror stops opening runs."""


@dataclass(frozen=True)
class WandbResult:
    """Outcome of the mirror. `location`: the project's URL, or offline the folder of all runs."""

    mode: Mode
    location: str = ""
    runs: int = 0
    lost: int = 0
    """Records (runs, points, summaries) that could not be logged."""
    error: str = ""
    """The first error."""
    partly_online: bool = False
    """The mirror started online and continued offline."""

    @property
    def notes(self) -> list[str]:
        """Lines that the run prints at its end."""
        if self.mode == "disabled":
            return []
        # After a loss of the connection, `wandb sync` also has to complete the runs that are partly online.
        option = "--include-online " if self.partly_online else ""
        where = self.location if self.mode == "online" else f"wandb sync {option}{shlex.quote(self.location)}"
        lines = [f"W&B ({self.mode}): {where}"] if self.runs else []
        if self.error:
            lines.append(f"W&B: {self.error}" + (f" ({self.lost:,} records are missing in W&B)" if self.lost else ""))
        return lines


class WandbMirror:
    """Mirrors a run's event log. Call `start()` before the run's first event is written and `close()` after its last.

    Events in the log at `start()` are of earlier invocations. Only the mirror's thread calls wandb.
    """

    def __init__(self, settings: Wandb, run: str, folder: Path, experiment: Mapping[str, Any]) -> None:
        self._settings = settings
        self._run = run
        self._folder = folder
        self._experiment = experiment
        self._mode: Mode = "disabled"
        self._reader = EventReader(folder / "events")
        self._earlier: list[Event] = []
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._runs: dict[str, wandb.Run] = {}
        self._histories: dict[str, History] = {}
        """By id, of the open runs."""
        self._opened: set[str] = set()
        self._consecutive_failures = 0
        self._lost = 0
        self._error = ""
        self._project_url = ""

    def start(self) -> None:
        if requested_mode(self._settings.mode, os.environ) == "disabled":
            return
        self._mode = "offline"
        self._earlier = self._reader.new()
        self._thread = threading.Thread(target=self._follow, name="wandb-mirror", daemon=True)
        self._thread.start()

    def close(self, hurried: Callable[[], bool] = lambda: False) -> WandbResult:
        """Write the rest of the log to W&B and finish all runs; a second call returns the same result. Waits at most
        CLOSE_SECONDS, and stops waiting when `hurried()`."""
        if self._thread is not None:
            self._closing.set()
            begin = time.monotonic()
            while self._thread.is_alive() and time.monotonic() - begin < CLOSE_SECONDS and not hurried():
                self._thread.join(0.1)
            if self._thread.is_alive():
                waited = time.monotonic() - begin
                self._record_error(f"still uploading after {waited:.0f} s; the rest is in {self._folder / 'wandb'}")
        location = self._project_url if self._mode == "online" else str(self._folder / "wandb")
        partly_online = self._mode == "offline" and self._project_url != ""
        return WandbResult(self._mode, location, len(self._opened), self._lost, self._error, partly_online)

    # The thread.

    def _follow(self) -> None:
        # An unexpected error ends the mirror, never the experiment; close() reports it.
        try:
            with _environment(self._folder / "wandb"):
                self._mode = self._resolve()
                try:
                    self._mirror()
                finally:
                    self._apply_all([Finish(id, INTERRUPTED) for id in self._runs])
        except Exception as error:
            self._record_error(_error_text(error), lost=1)

    def _resolve(self) -> Mode:
        requested = requested_mode(self._settings.mode, os.environ)
        if requested == "offline":
            return "offline"
        try:
            key_found = has_key()
        except Exception as error:  # a malformed key
            self._record_error(f"{_error_text(error)}; written offline instead")
            return "offline"
        if not key_found and requested == "online":
            self._record_error("no API key is set: log in with `wandb login`; written offline instead")
        return "online" if key_found else "offline"

    def _mirror(self) -> None:
        repair_files(self._folder / "wandb")
        exited = exit_codes(self._folder / "wandb")
        translator = Translator(self._run, self._experiment, exited, self._settings.log_texts)
        self._apply_all(translator.before(self._earlier))
        self._earlier.clear()
        pending: list[Event] = []
        closing = False
        while not closing:
            closing = self._closing.wait(POLL_SECONDS) or self._closing.is_set()
            pending = sorted(pending + self._reader.new(), key=lambda event: float(event["t"]))
            settled = time.time() - SETTLE_SECONDS
            ready = [event for event in pending if closing or event["t"] <= settled]
            pending = pending[len(ready) :]
            self._apply_all(translator.translate(ready))
        report, id = self._folder / "report.html", run_id(self._run)
        if self._settings.log_texts and report.is_file() and id in self._runs:
            self._attempt(partial(self._runs[id].save, report, base_path=self._folder, policy="end", glob=False))
        self._apply_all(translator.close())
        if translator.late:
            self._record_error("metrics were logged after the end of their stage", lost=translator.late)

    def _apply_all(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Open) and self._consecutive_failures < MAX_CONSECUTIVE_FAILURES:
                self._attempt(partial(self._open_or_go_offline, action))
                self._consecutive_failures = 0 if action.id in self._runs else self._consecutive_failures + 1
            elif action.id in self._runs:
                self._attempt(partial(self._apply, action))
            else:
                self._lost += 1

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._record_error(_error_text(error), lost=1)

    def _record_error(self, problem: str, lost: int = 0) -> None:
        self._error = self._error or problem
        self._lost += lost

    # Calls of wandb.

    def _open_or_go_offline(self, action: Open) -> None:
        try:
            self._open(action)
        except Exception as error:
            if self._mode == "offline":
                raise
            self._go_offline(error)
            _free_ids(self._runs)
            self._open(action)

    def _go_offline(self, error: Exception) -> None:
        self._mode = "offline"
        self._record_error(f"{_error_text(error)}; written offline from then on")

    def _open(self, action: Open) -> None:
        import wandb

        stored = stored_rows(self._folder / "wandb", action.id)
        run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            dir=str(self._folder),
            id=action.id,
            name=action.name,
            group=self._run,
            job_type=action.job_type,
            config=action.config,
            tags=action.tags,
            mode="online" if self._mode == "online" else "offline",
            resume="allow",
            reinit="create_new",  # several runs are open at a time
            settings=_settings(),
        )
        self._runs[action.id] = run
        self._histories[action.id] = History(stored, run.starting_step if self._mode == "online" else None)
        self._opened.add(action.id)
        if self._mode == "online":
            self._project_url = run.project_url or ""

    def _apply(self, action: Action) -> None:
        run = self._runs[action.id]
        match action:
            case WandbAxis(prefix=prefix):
                run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
            case Log(values=values, time=timestamp, always=always):
                history = self._histories[action.id]
                row = (history.append(), values) if always else history.add(values)
                if row is not None:
                    step, values = row
                    converted = {name: _to_wandb(value) for name, value in values.items()}
                    run.log({**converted, "_timestamp": timestamp}, step=step, commit=True)
            case Summarize(values=values):
                run.summary.update(values)
            case Finish(exit_code=exit_code):
                del self._runs[action.id], self._histories[action.id]
                try:
                    run.finish(exit_code=exit_code)
                except TimeoutError as error:  # nothing is lost: the run is on disk
                    self._go_offline(error)


def requested_mode(mode: str, environment: Mapping[str, str]) -> str:
    """Return the experiment's mode; for `auto` the value of WANDB_MODE, or `auto` if it is not set."""
    if mode != "auto":
        return mode
    value = environment.get("WANDB_MODE", "").strip().lower()
    # wandb's former names; `shared` is for several writers, but there is one.
    names = {"": "auto", "dryrun": "offline", "run": "online", "shared": "online"}
    value = names.get(value, value)
    return value if value in ("auto", "online", "disabled") else "offline"


def has_key() -> bool:
    """Whether wandb finds an API key (WANDB_API_KEY, netrc, its settings), without a prompt or network access."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _free_ids(open_runs: Mapping[str, wandb.Run]) -> None:
    """Free the ids of runs that could not be opened: they stay "in use" until wandb's service is torn down, which is
    possible only while no run is open.

    Without a network from the start nothing is lost; if it fails while runs are open, the run being opened is lost.
    """
    import wandb

    if not open_runs and wandb.run is None:
        wandb.teardown()


def _settings() -> wandb.Settings:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,  # command line, user and host name of the driver
        symlink=False,  # the report is part of the run, not a link out of it
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        # W&B would show the driver's CPU and GPU load as the training's, which may run on other machines.
        x_disable_stats=True,
        # A list of all installed packages costs 0.1 s and 20 kB per run; the comparison's config has the versions.
        x_save_requirements=False,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
    )


def _to_wandb(value: HistoryValue) -> Any:
    import wandb

    match value:
        case WandbTable(columns=columns, rows=rows):
            return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        case Histogram(edges=edges, counts=counts):
            return wandb.Histogram(np_histogram=(counts, edges))
        case _:
            return value


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Set options that wandb only reads from the environment. The user's values take precedence."""
    variables = {
        "WANDB_SILENT": "true",
        "WANDB_DATA_DIR": str((folder / "data").absolute()),
        "WANDB_CACHE_DIR": str((folder / "cache").absolute()),
        **os.environ,
        # wandb's error reporting resolves its server's name even offline.
        "WANDB_ERROR_REPORTING": "false",
    }
    before = {name: os.environ.get(name) for name in variables if os.environ.get(name) != variables[name]}
    os.environ.update({name: variables[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _error_text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

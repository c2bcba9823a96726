"""W&B, drawn from the event log by one thread of the driver.

Workers never import wandb: there is one writer, no key travels to the workers, and nothing has to know its rank. What
W&B is told is decided in `wandb_translate`; here it is only told. W&B may fail (no network, full disk, a deleted run)
without the experiment: what was lost is counted, and told once when the mirror is closed.

Everything is kept under `<run>/wandb`, also the files of tables that wait for their upload, which wandb would put into
the user's home.

After a kill, W&B lacks what the log had for less than SETTLE_SECONDS + POLL_SECONDS, and what its own process had not
written to disk for as long as FLUSH_SECONDS: about four seconds. The next invocation reads W&B's files back
(wandb_files.py) and writes what they lack from the log, under the same run id and with growing `_step`s, into a
further file, which `wandb sync` appends to the first. Online it goes by the number of rows that the server has: what
was only in a file is sent again, and what was sent but not yet in a file is not. Two things it can't know: offline,
that a synced file was deleted before the run ended (`wandb clean`), which makes it write the run again; and that the
files of an interrupted offline run are synced only after the run went on online.
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
from tunery.reporting.wandb_translate import INTERRUPTED, Action, Axis, Finish, Log, Open, Summarize, Translator, run_id
from tunery.reporting.wandb_values import Drawn, Histogram, Table
from tunery.spec import Wandb

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

POLL_SECONDS = 1.0
SETTLE_SECONDS = 2.0
"""Events wait this long: a stage's end, read from one file, must not overtake its last point in another."""
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0
"""How long W&B may keep the mirror waiting. After that it goes on offline, and `wandb sync` uploads later."""
CLOSE_SECONDS = 180.0
FLUSH_SECONDS = 1.0
"""How long wandb's process may hold records back from its file; by default 15."""
TRIES = 3
"""Runs in a row that can't be opened, not even offline, before W&B is left alone."""


@dataclass(frozen=True)
class WandbResult:
    """What became of the mirror. `place`: the project's URL, or offline the folder of all runs."""

    mode: Mode
    place: str = ""
    runs: int = 0
    lost: int = 0
    """Things (runs, points, summaries) that W&B was not told."""
    error: str = ""
    """The first thing that went wrong."""
    partly_online: bool = False
    """It began online and went on offline."""

    @property
    def notes(self) -> list[str]:
        """Lines for the table that the run ends with."""
        if self.mode == "disabled":
            return []
        # Where W&B was lost on the way, the runs that it has in part are synced as well.
        how = "--include-online " if self.partly_online else ""
        where = self.place if self.mode == "online" else f"wandb sync {how}{shlex.quote(self.place)}"
        lines = [f"W&B ({self.mode}): {where}"] if self.runs else []
        if self.error:
            lines.append(f"W&B: {self.error}" + (f" ({self.lost:,} things are missing there)" if self.lost else ""))
        return lines


class WandbMirror:
    """`start()` before the run's first event is written, `close()` after its last.

    What the log holds at `start()` is of earlier invocations. All calls of wandb are made by the mirror's own thread.
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
        """Of the open runs."""
        self._opened: set[str] = set()
        self._failed_in_a_row = 0
        self._lost = 0
        self._error = ""
        self._project_url = ""

    def start(self) -> None:
        if wanted_mode(self._settings.mode, os.environ) == "disabled":
            return
        self._mode = "offline"
        self._earlier = self._reader.new()
        self._thread = threading.Thread(target=self._follow, name="wandb-mirror", daemon=True)
        self._thread.start()

    def close(self, hurried: Callable[[], bool] = lambda: False) -> WandbResult:
        """Write the rest of the log to W&B and end all its runs; a second call gives the same. Waits at most
        CLOSE_SECONDS, and only until `hurried()`."""
        if self._thread is not None:
            self._closing.set()
            begin = time.monotonic()
            while self._thread.is_alive() and time.monotonic() - begin < CLOSE_SECONDS and not hurried():
                self._thread.join(0.1)
            if self._thread.is_alive():
                waited = time.monotonic() - begin
                self._failed(f"still uploading after {waited:.0f} s; the rest is in {self._folder / 'wandb'}")
        place = self._project_url if self._mode == "online" else str(self._folder / "wandb")
        partly = self._mode == "offline" and self._project_url != ""
        return WandbResult(self._mode, place, len(self._opened), self._lost, self._error, partly)

    # The thread.

    def _follow(self) -> None:
        # Everything that is not foreseen ends the mirror, never the experiment; close() tells it.
        try:
            with _environment(self._folder / "wandb"):
                self._mode = self._resolve()
                try:
                    self._draw()
                finally:
                    self._tell_all([Finish(id, INTERRUPTED) for id in self._runs])
        except Exception as error:
            self._failed(_said(error), lost=1)

    def _resolve(self) -> Mode:
        wanted = wanted_mode(self._settings.mode, os.environ)
        if wanted == "offline":
            return "offline"
        try:
            found = has_key()
        except Exception as error:  # a key of the wrong form
            self._failed(f"{_said(error)}; written offline instead")
            return "offline"
        if not found and wanted == "online":
            self._failed("no API key is set: log in with `wandb login`; written offline instead")
        return "online" if found else "offline"

    def _draw(self) -> None:
        repair_files(self._folder / "wandb")
        translator = Translator(self._run, self._experiment, exit_codes(self._folder / "wandb"))
        self._tell_all(translator.before(self._earlier))
        self._earlier.clear()
        waiting: list[Event] = []
        closing = False
        while not closing:
            closing = self._closing.wait(POLL_SECONDS) or self._closing.is_set()
            waiting = sorted(waiting + self._reader.new(), key=lambda event: float(event["t"]))
            settled = time.time() - SETTLE_SECONDS
            ready = [event for event in waiting if closing or event["t"] <= settled]
            waiting = waiting[len(ready) :]
            self._tell_all(translator.translate(ready))
        report, whole = self._folder / "report.html", run_id(self._run)
        if report.is_file() and whole in self._runs:
            self._attempt(partial(self._runs[whole].save, report, base_path=self._folder, policy="end", glob=False))
        self._tell_all(translator.close())
        if translator.late:
            self._failed("points came after the end of their stage", lost=translator.late)

    def _tell_all(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Open) and self._failed_in_a_row < TRIES:
                self._attempt(partial(self._open_or_go_offline, action))
                self._failed_in_a_row = 0 if action.id in self._runs else self._failed_in_a_row + 1
            elif action.id in self._runs:
                self._attempt(partial(self._tell, action))
            else:
                self._lost += 1

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._failed(_said(error), lost=1)

    def _failed(self, problem: str, lost: int = 0) -> None:
        self._error = self._error or problem
        self._lost += lost

    # The calls of wandb.

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
        self._failed(f"{_said(error)}; written offline from then on")

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

    def _tell(self, action: Action) -> None:
        run = self._runs[action.id]
        match action:
            case Axis(prefix=prefix):
                run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
            case Log(values=values, time=at, again=again):
                history = self._histories[action.id]
                row = (history.append(), values) if again else history.add(values)
                if row is not None:
                    step, values = row
                    drawn = {name: _drawable(value) for name, value in values.items()}
                    run.log({**drawn, "_timestamp": at}, step=step, commit=True)
            case Summarize(values=values):
                run.summary.update(values)
            case Finish(exit_code=exit_code):
                del self._runs[action.id], self._histories[action.id]
                try:
                    run.finish(exit_code=exit_code)
                except TimeoutError as error:  # not lost: it is on disk
                    self._go_offline(error)


def wanted_mode(mode: str, environment: Mapping[str, str]) -> str:
    """`auto`: what WANDB_MODE says, and else still `auto`; a mode that the file names stands."""
    if mode != "auto":
        return mode
    told = environment.get("WANDB_MODE", "").strip().lower()
    # wandb's own former names. `shared` is for several writers, and here is one.
    names = {"": "auto", "dryrun": "offline", "run": "online", "shared": "online"}
    told = names.get(told, told)
    return told if told in ("auto", "online", "disabled") else "offline"


def has_key() -> bool:
    """Whether wandb finds a key (WANDB_API_KEY, netrc, its settings). Asks nobody and does not reach the network."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _free_ids(open_runs: Mapping[str, wandb.Run]) -> None:
    """A run that could not be opened keeps its id "in use" until wandb's service ends, which needs all runs ended.

    So a network that is missing from the start loses nothing; one that breaks while runs are open loses the one run
    that was to be opened then.
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
        symlink=False,  # the report is part of the run, not a link out of it
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        # The driver's CPU and GPU load would be drawn as if it were the training's, which may run on other machines.
        x_disable_stats=True,
        # A list of all installed packages a run: 0.1 s and 20 kB each, and the versions are in the comparison's config.
        x_save_requirements=False,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
    )


def _drawable(value: Drawn) -> Any:
    import wandb

    match value:
        case Table(columns=columns, rows=rows):
            return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        case Histogram(edges=edges, counts=counts):
            return wandb.Histogram(np_histogram=(counts, edges))
        case _:
            return value


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What wandb takes from the environment alone. The user's own choice of silence and folders stands."""
    chosen = {
        "WANDB_SILENT": "true",
        "WANDB_DATA_DIR": str((folder / "data").absolute()),
        "WANDB_CACHE_DIR": str((folder / "cache").absolute()),
        **os.environ,
        # wandb's reports of its own errors look up their server even offline.
        "WANDB_ERROR_REPORTING": "false",
    }
    before = {name: os.environ.get(name) for name in chosen if os.environ.get(name) != chosen[name]}
    os.environ.update({name: chosen[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

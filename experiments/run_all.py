"""Run every experiment of this folder, one after another, in one store, and print a table of their results.

    python experiments/run_all.py --store .tunery              # all; what the store has is reused
    python experiments/run_all.py kto grpo --store .tunery     # these two

`make experiments` runs all. Exit code 1 if one failed. review.yaml needs a person's decisions: without them it stops at
its `review` stage, as its comment says, and does not count as failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tunery.events.event_log import read_events
from tunery.events.event_reducer import replay
from tunery.events.formatting import measure
from tunery.events.run_state import RunState
from tunery.review.decisions import decisions_path
from tunery.spec import Review, load
from tunery.store import DEFAULT_STORE, Store

FOLDER = Path(__file__).parent
FIGURES = {
    "Injected corruption": ("recall",),
    "Diversity": ("radius",),
    "Agreement of filter and reviewer": ("agreement",),
    "Classifiers": ("AUC",),
    "Reward models": ("accuracy",),
    "Rewards": ("reward before", "reward after"),
    "Held-out loss (nats per response token)": ("loss",),
    "Win rates": ("win rate", "95% interval"),
}
"""Columns of a run's summary tables that the table here shows, by title."""
SEARCH_TABLE = "Search, best first"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments, without .yaml; all when not given")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE)
    options = parser.parse_args()
    names = options.names or sorted(path.stem for path in FOLDER.glob("*.yaml"))
    results = [_run(FOLDER / f"{name}.yaml", options.store) for name in names]
    table = Table("experiment", "seconds", "state", "figures", title="Experiments", title_justify="left")
    for name, seconds, state, figures in results:
        table.add_row(name, f"{seconds:,.0f}", state, "\n".join(figures))
    Console(highlight=False).print(table)
    failed = [name for name, _, state, _ in results if state == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(file: Path, store: Path) -> tuple[str, float, str, list[str]]:
    """Run an experiment. Return its name, the wall time in seconds, its state and its main figures."""
    print(f"\n== {file.name}: {file.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}", flush=True)
    start_time = time.monotonic()
    command = [sys.executable, "-m", "tunery", "run", str(file), "--store", str(store)]
    failed = subprocess.run(command, check=False).returncode != 0
    seconds = time.monotonic() - start_time
    state = replay(read_events(Store(store).run(file.stem) / "events"))  # a run has the name of its file
    if not failed:
        return file.stem, seconds, "done", figures(state)
    if awaits_review(file, state):
        return file.stem, seconds, "needs review", [f"no decisions yet at {state.failures[0].stage}"]
    return file.stem, seconds, "failed", ["its error is above"]


def awaits_review(file: Path, state: RunState) -> bool:
    """Return whether a run stopped at a `review` stage whose decision file does not exist yet."""
    failed = [failure.stage for failure in state.failures]
    if not failed or any(state.stages[name].kind != "review" for name in failed):
        return False
    stages = [load(file)[0].stages[name] for name in failed]
    return all(isinstance(stage, Review) and not decisions_path(stage, file.parent).exists() for stage in stages)


def figures(state: RunState) -> list[str]:
    """Return the main figures of a run: columns of its summary tables, and the outcome of its search."""
    lines = [_figures(state.comparisons[title], FIGURES[title]) for title in state.comparisons if title in FIGURES]
    if state.search is not None:
        lines += state.comparisons[SEARCH_TABLE]["notes"]
        lines.append(f"steps of all trials: {sum(trial.steps or 0 for trial in state.search.originals):,.0f}")
    return lines


def _figures(table: Mapping[str, Any], columns: Sequence[str]) -> str:
    indices = [table["columns"].index(column) for column in columns]
    rows = [(row[0], " ".join(_cell(row[index]) for index in indices)) for row in table["rows"]]
    return f"{', '.join(columns)}: " + ", ".join(f"{name} {values}" for name, values in rows)


def _cell(value: object) -> str:
    return "-" if value is None else measure(value) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

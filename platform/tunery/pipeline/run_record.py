"""Load a run from its event log: the experiment that was last run, and its state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunery.errors import RequestError
from tunery.events.event_log import Event, read_events
from tunery.events.event_reducer import replay
from tunery.events.run_state import RunState
from tunery.spec import Experiment
from tunery.spec.loader import parse
from tunery.spec.yaml_source import YamlSource, read_yaml
from tunery.store import Store

FILE_VALUES = "file"
"""Selects the artifacts with the file's own values where a trial name is expected."""


@dataclass(frozen=True)
class RunRecord:
    folder: Path
    events: list[Event]
    """Events of the invocations with this experiment."""
    state: RunState
    experiment: Experiment
    source: YamlSource


def read_run(run: str, store: Store) -> RunRecord:
    """Load a run by name or folder. Raises RequestError if it does not exist or has not started."""
    folder = store.find_run(run)
    events = of_last_experiment(read_events(folder / "events"))
    state = replay(events)
    if not state.text:
        raise RequestError(
            f"the run `{folder.name}` has no model and no trial",
            cause="its event log has no stage",
            remedy="start it with `tunery run`",
        )
    source = read_yaml(state.text, f"{state.file} (as run by {folder.name})")
    return RunRecord(folder, events, state, parse(source), source)


def of_last_experiment(events: list[Event]) -> list[Event]:
    """Drop the invocations before the file was edited, whose trials may have the same names."""
    texts = [str(event.get("text", "")) for event in events if event["event"] == "run_started"]
    kept, is_same = [], False
    for event in events:
        if event["event"] == "run_started":
            is_same = _is_same_text(str(event.get("text", "")), texts[-1])
        if is_same:
            kept.append(event)
    return kept


def _is_same_text(text: str, other: str) -> bool:
    try:
        return text == other or has_same_results(parse(read_yaml(text, "")), parse(read_yaml(other, "")))
    except RequestError:  # written by another version of tunery
        return False


def has_same_results(one: Experiment, other: Experiment) -> bool:
    """Whether two experiments produce the same results. They may differ in `compute` and `tracking`, which do not
    change results."""
    excluded = {"compute", "tracking"}
    return one.model_dump(exclude=excluded) == other.model_dump(exclude=excluded)

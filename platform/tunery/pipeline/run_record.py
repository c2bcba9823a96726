"""A run as its event log tells it: the experiment as it was last run, and what became of it."""

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

OWN = "file"
"""In place of a trial's name: what was made with the file's own values."""


@dataclass(frozen=True)
class Recorded:
    folder: Path
    events: list[Event]
    """Of the invocations with this experiment."""
    state: RunState
    experiment: Experiment
    source: YamlSource


def read_run(run: str, store: Store) -> Recorded:
    """`run`: a name or a folder. Raises RequestError where there is no such run, or it has not begun."""
    folder = store.find_run(run)
    events = of_last_experiment(read_events(folder / "events"))
    state = replay(events)
    if not state.text:
        raise RequestError(
            f"the run `{folder.name}` has no model and no trial",
            cause="its event log doesn't tell of any stage",
            remedy="run it",
        )
    source = read_yaml(state.text, f"{state.file} (as {folder.name} has run it)")
    return Recorded(folder, events, state, parse(source), source)


def of_last_experiment(events: list[Event]) -> list[Event]:
    """Without the invocations before the file was edited: what their trials made has the same names."""
    texts = [str(event.get("text", "")) for event in events if event["event"] == "run_started"]
    kept, alike = [], False
    for event in events:
        if event["event"] == "run_started":
            alike = _is_same_text(str(event.get("text", "")), texts[-1])
        if alike:
            kept.append(event)
    return kept


def _is_same_text(text: str, other: str) -> bool:
    try:
        return text == other or asks_the_same(parse(read_yaml(text, "")), parse(read_yaml(other, "")))
    except RequestError:  # of another version of tunery
        return False


def asks_the_same(one: Experiment, other: Experiment) -> bool:
    """Whether they ask for the same models: `compute` and `tracking` say how, not what."""
    how = {"compute", "tracking"}
    return one.model_dump(exclude=how) == other.model_dump(exclude=how)

"""`tunery trials RUN --stop, --add, --clone`: validate commands to a search and write them for it to read.

A trial to add is validated as a complete experiment with its values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from rich.console import RenderableType
from rich.text import Text

from tunery.errors import RequestError, SpecError
from tunery.events.formatting import overrides_text
from tunery.pipeline.run_record import RunRecord, read_run
from tunery.pipeline.validate_space import check_trial
from tunery.search.space import curve_stage, metric_stages, trial_experiment, trial_id
from tunery.search.steering import SearchControl
from tunery.search.trials import OPEN, TrialRow, Trials, list_trials
from tunery.spec import AUTO, Experiment, Training
from tunery.spec.check_references import check_references, check_scores
from tunery.spec.check_search import metrics_of
from tunery.spec.error_messages import sentence
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import PathError, with_overrides
from tunery.spec.trainings import data_refs
from tunery.spec.yaml_source import read_yaml
from tunery.store import Store, active_owner

Values = dict[str, Any]


@dataclass(frozen=True)
class TrialCommand:
    """A command that was written for the search."""

    command: str
    """stop, add or clone."""
    trials: tuple[str, ...]
    overrides: Values
    """Values of a trial to add."""
    of: str
    """The trial that it is a clone of."""
    listing: Trials
    """The trials of the run when the command was given."""
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.listing.run,
            "command": self.command,
            "trials": list(self.trials),
            "overrides": self.overrides,
            "of": self.of,
            "search": self.listing.search_state,
            "running": bool(self.listing.owner),
            "notes": list(self.notes),
        }

    def render(self, width: int) -> RenderableType:
        return Text("\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        for trial in self.trials:
            if self.command == "stop":
                pending = self.listing.find(trial).state == "pending"
                yield f"{trial}: " + ("will not start" if pending else "ends after its current step")
            else:
                origin = f"clone of {self.of}, " if self.of else ""
                yield f"{trial}: {origin}{overrides_text(self.overrides)}"
        yield from (f"note: {note}" for note in self.notes)
        if not self.listing.owner:
            yield (
                f"`{self.listing.run}` is not running: the command is kept until `tunery run {self.listing.file}` "
                "resumes it"
            )
        elif self.listing.search_state == "not started":
            yield "the search has not started: it applies the command when it starts"
        elif self.command != "stop":
            yield "it starts when a worker is free"


def trials(
    run: str, store: Store, words: Sequence[str], *, stop: bool = False, add: bool = False, clone: str | None = None
) -> Trials | TrialCommand:
    """List the trials of a run, or write a command. `words` are trial names for `stop`, and path=value pairs for `add`
    and `clone`. Raises RequestError before anything is written."""
    record = read_run(run, store)
    if record.experiment.search is None:
        raise RequestError(
            f"the run `{record.folder.name}` has no search",
            remedy="`tunery report` shows a run without one; a file with `search:` has trials",
        )
    _check_request(words, stop, add, clone)
    control = SearchControl(record.folder)
    owner = active_owner(record.folder / "lease") or ""
    requests = control.new_trials()
    listing = list_trials(record.state, record.events, requests, control.stop_requested, owner, time.time())
    if not (stop or add or clone is not None):
        return listing
    if listing.search_state == "ended":
        raise RequestError(
            f"the search of `{listing.run}` has ended",
            cause=f"it had {len(listing.trials)} trials",
            remedy=f"raise `trials`, or change the space, in {listing.file}: this starts another search, which reuses "
            "the artifacts of this one",
        )
    if stop:
        names = _open_trials(listing, words)
        for name in names:
            control.request_stop(name)
        return TrialCommand("stop", names, {}, "", listing)
    source = listing.find(clone) if clone is not None else None
    overrides = {**(source.overrides if source else {}), **_parse_values(words)}
    validate_values(record, overrides, listing.trials, tuple(_parse_values(words)))
    origin, of = ("cloned", source.name) if source else ("added", "")
    control.add_trial(overrides, origin, of)
    notes = incomparable_notes(record.experiment, overrides)
    return TrialCommand("clone" if source else "add", (trial_id(overrides),), overrides, of, listing, notes)


def incomparable_notes(experiment: Experiment, overrides: Values) -> tuple[str, ...]:
    """Return a note for each value that changes the evaluation data too, so that the metric is not comparable."""
    search, name = experiment.search, curve_stage(experiment)
    stage = experiment.stages.get(name or "")
    if search is None or not isinstance(stage, Training) or stage.eval_data is None:
        return ()
    eval_stages = with_upstream(experiment.stages, data_refs(stage.eval_data).values())
    eval_fields = (f"{name}.max_length", f"{name}.eval_data")
    return tuple(
        f"`{path}` also changes the data that `{search.metric}` is computed on: its value is not comparable"
        for path in overrides
        if path not in search.space and (path in eval_fields or path.split(".")[0] in eval_stages)
    )


def validate_values(record: RunRecord, overrides: Values, known: Sequence[TrialRow], changed: Sequence[str]) -> None:
    """Raise RequestError if the values are not valid for a trial, or a trial has them already. `changed` are the paths
    that the user gave."""
    experiment = record.experiment
    search = experiment.search
    assert search is not None, "checked before"
    given = {path: overrides[path] for path in changed}
    edited = _apply_overrides(experiment, overrides, changed)
    for error in (
        *check_references(edited, record.source),
        *check_scores(edited, record.source),
    ):
        _reject(given, error.message, error.cause, error.remedy)
    required = with_upstream(edited.stages, metric_stages(search))
    for path in changed:
        if path.split(".")[0] not in required:
            raise RequestError(
                f"`{path}` can't change `{search.metric}`",
                cause=f"`{search.metric.split('.')[0]}` does not depend on `{path.split('.')[0]}`",
                remedy=f"change fields of: {', '.join(required)}",
            )
    logged = metrics_of(edited)
    for metric in search.metrics:
        if metric not in logged:
            _reject(given, f"no stage would log `{metric}`", "", "do not change the fields that define the metric")
    invalid = check_trial(edited, experiment, record.source, _folder(record), _workers(experiment))
    if invalid is not None:
        _reject(given, invalid.message, invalid.cause, invalid.remedy)
    stages = trial_experiment(experiment, overrides).stages
    for trial in known:
        if trial.overrides == overrides or _stages_of(experiment, trial.overrides) == stages:
            raise RequestError(
                f"{trial.name} has these values already",
                cause=f"it is {trial.state}: {overrides_text(trial.overrides)}",
                remedy="give another value; to repeat the trial, give another `seed` for the training",
            )


def _apply_overrides(experiment: Experiment, overrides: Values, changed: Sequence[str]) -> Experiment:
    try:
        return with_overrides(experiment, overrides)
    except PathError as error:
        raise RequestError(f"no field has the path {error}", remedy=error.remedy) from None
    except ValidationError as error:
        first = error.errors()[0]
        keys = {str(key) for key in first["loc"]}
        invalid = [path for path in changed if {path.split(".")[0], path.split(".")[-1]} <= keys] or list(changed)
        _reject({path: overrides[path] for path in invalid}, "", sentence(first), "give a value that the field accepts")


def _reject(values: Values, message: str, cause: str, remedy: str) -> NoReturn:
    rejected = " and ".join(f"`{path}` can't be {json.dumps(value)}" for path, value in values.items())
    raise RequestError(rejected or message, cause="; ".join(part for part in (message, cause) if part), remedy=remedy)


def _stages_of(experiment: Experiment, overrides: Mapping[str, Any]) -> Any:
    try:
        return trial_experiment(experiment, overrides).stages
    except ValueError:  # requested before the file was edited
        return None


def _folder(record: RunRecord) -> Path | None:
    """Return the directory of the experiment file, which relative paths refer to; None if it does not exist here."""
    file = Path(record.state.file)
    return file.parent if file.is_file() else None


def _workers(experiment: Experiment) -> int:
    workers = experiment.compute.workers_per_trial
    return 1 if workers == AUTO else workers


def _open_trials(listing: Trials, words: Sequence[str]) -> tuple[str, ...]:
    """Return the full names of trials. Raises RequestError if one of them has ended."""
    selected = [listing.find(word) for word in words]
    for trial in selected:
        if trial.state not in OPEN:
            raise RequestError(
                f"{trial.name} has ended",
                cause=f"it is {trial.state}",
                remedy="stop one of: " + (", ".join(one.name for one in listing.trials if one.state in OPEN) or "none"),
            )
    return tuple(dict.fromkeys(trial.name for trial in selected))


def _parse_values(words: Sequence[str]) -> Values:
    """Parse `path=value` pairs; values are YAML, as in an experiment file."""
    values: Values = {}
    for word in words:
        path, equals, text = word.partition("=")
        path = path.strip()
        if not equals or not path:
            raise RequestError(
                f"`{word}` is not a path=value pair", remedy="write path=value, such as sft.learning_rate=1e-3"
            )
        if path in values:
            raise RequestError(f"`{path}` is given twice", remedy="a command adds one trial: give it once per trial")
        try:
            values[path] = read_yaml(text, word).data
        except SpecError as error:
            raise RequestError(f"`{word}`: {error.message}", cause=error.cause, remedy=error.remedy) from None
    return values


def _check_request(words: Sequence[str], stop: bool, add: bool, clone: str | None) -> None:
    options = [name for name, given in (("--stop", stop), ("--add", add), ("--clone", clone is not None)) if given]
    if len(options) > 1:
        raise RequestError(f"{' and '.join(options)} can't be combined", remedy="give one of them per command")
    if words and not options:
        raise RequestError(
            f"no option says what to do with `{' '.join(words)}`",
            remedy="give --stop before trials, --add or --clone TRIAL before values",
        )
    if options and not words:
        needs = "a trial: --stop TRIAL.." if stop else f"a value: {options[0]}{' TRIAL' if clone else ''} path=value.."
        raise RequestError(
            f"{options[0]} needs {needs}", remedy="`tunery trials RUN` lists the trials and their values"
        )

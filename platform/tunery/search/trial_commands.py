"""`tunery trials RUN --stop, --add, --clone`: wishes about a search, checked before they are written for it to read.

A trial to add is checked as what it will be: the whole experiment with its values.
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
from tunery.pipeline.run_record import Recorded, read_run
from tunery.pipeline.validate import check_trial
from tunery.search.space import curve_stage, metric_stages, trial_experiment, trial_id
from tunery.search.steering import SearchControl
from tunery.search.trials import OPEN, TrialRow, Trials, trials_of
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
    """What was written for the search."""

    wish: str
    """stop, add or clone."""
    trials: tuple[str, ...]
    overrides: Values
    """Of a trial to add."""
    of: str
    about: Trials
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.about.run,
            "wish": self.wish,
            "trials": list(self.trials),
            "overrides": self.overrides,
            "of": self.of,
            "search": self.about.stage,
            "running": bool(self.about.holder),
            "notes": list(self.notes),
        }

    def render(self, width: int) -> RenderableType:
        return Text("\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        for trial in self.trials:
            if self.wish == "stop":
                waits = self.about.named(trial).state == "waiting"
                yield f"{trial}: " + ("it will not begin" if waits else "ends after the step that it is at")
            else:
                origin = f"cloned of {self.of}, " if self.of else ""
                yield f"{trial}: {origin}{overrides_text(self.overrides)}"
        yield from (f"note: {note}" for note in self.notes)
        if not self.about.holder:
            again = f"kept until `tunery run {self.about.file}` is given again"
            yield f"nobody runs `{self.about.run}` at the moment: {again}"
        elif self.about.stage == "not begun":
            yield "the search has not begun: it takes this up when it does"
        elif self.wish != "stop":
            yield "it begins when there is room for it"


def trials(
    run: str, store: Store, words: Sequence[str], *, stop: bool = False, add: bool = False, clone: str | None = None
) -> Trials | TrialCommand:
    """The trials of a run, or a wish about them. `words`: of `stop` trials; of `add` and `clone` values, path=value
    each. Raises RequestError, before anything is written."""
    recorded = read_run(run, store)
    if recorded.experiment.search is None:
        raise RequestError(
            f"the run `{recorded.folder.name}` has no search",
            remedy="`tunery report` shows a run without one; a file with `search:` has trials",
        )
    _check_request(words, stop, add, clone)
    steering = SearchControl(recorded.folder)
    holder = active_owner(recorded.folder / "lease") or ""
    wishes = steering.new()
    told = trials_of(recorded.state, recorded.events, wishes, steering.stops, holder, time.time())
    if not (stop or add or clone is not None):
        return told
    if told.stage == "ended":
        raise RequestError(
            f"the search of `{told.run}` has ended",
            cause=f"it had {len(told.trials)} trials",
            remedy=f"raise `trials`, or change the space, in {told.file}: that is another search, which finds in the "
            "store what this one made",
        )
    if stop:
        chosen = _to_stop(told, words)
        for name in chosen:
            steering.stop(name)
        return TrialCommand("stop", chosen, {}, "", told)
    source = told.named(clone) if clone is not None else None
    overrides = {**(source.overrides if source else {}), **_values(words)}
    check_values(recorded, overrides, told.trials, tuple(_values(words)))
    origin, of = ("cloned", source.name) if source else ("added", "")
    steering.add(overrides, origin, of)
    notes = measured_otherwise(recorded.experiment, overrides)
    return TrialCommand("clone" if source else "add", (trial_id(overrides),), overrides, of, told, notes)


def measured_otherwise(experiment: Experiment, overrides: Values) -> tuple[str, ...]:
    """Values that change not only the model but what it is measured on."""
    search, name = experiment.search, curve_stage(experiment)
    stage = experiment.stages.get(name or "")
    if search is None or not isinstance(stage, Training) or stage.eval_data is None:
        return ()
    held_out = with_upstream(experiment.stages, data_refs(stage.eval_data).values())
    own = (f"{name}.max_length", f"{name}.eval_data")
    return tuple(
        f"`{path}` changes what `{search.metric}` is measured on too: its value is not like the others'"
        for path in overrides
        if path not in search.space and (path in own or path.split(".")[0] in held_out)
    )


def check_values(recorded: Recorded, overrides: Values, known: Sequence[TrialRow], changed: Sequence[str]) -> None:
    """Raises RequestError where no trial can have these values, or one has them. `changed`: paths that were given."""
    experiment = recorded.experiment
    search = experiment.search
    assert search is not None, "checked before"
    given = {path: overrides[path] for path in changed}
    whole = _with(experiment, overrides, changed)
    for error in (*check_references(whole, recorded.source), *check_scores(whole, recorded.source)):
        _refuse(given, error.message, error.cause, error.remedy)
    needed = with_upstream(whole.stages, metric_stages(search))
    for path in changed:
        if path.split(".")[0] not in needed:
            raise RequestError(
                f"`{path}` can't change `{search.metric}`",
                cause=f"`{search.metric.split('.')[0]}` does not depend on `{path.split('.')[0]}`",
                remedy=f"change fields of: {', '.join(needed)}",
            )
    logged = metrics_of(whole)
    for metric in search.metrics:
        if metric not in logged:
            _refuse(given, f"nobody would log `{metric}`", "", "leave the fields alone that it is measured by")
    wrong = check_trial(whole, experiment, recorded.source, _folder(recorded), _workers(experiment))
    if wrong is not None:
        _refuse(given, wrong.message, wrong.cause, wrong.remedy)
    stages = trial_experiment(experiment, overrides).stages
    for trial in known:
        if trial.overrides == overrides or _stages_of(experiment, trial.overrides) == stages:
            raise RequestError(
                f"{trial.name} has these values already",
                cause=f"it is {trial.state}: {overrides_text(trial.overrides)}",
                remedy="give another value; the same ones with another chance are another `seed` of the training",
            )


def _with(experiment: Experiment, overrides: Values, changed: Sequence[str]) -> Experiment:
    try:
        return with_overrides(experiment, overrides)
    except PathError as error:
        raise RequestError(f"no field has the path {error}", remedy=error.remedy) from None
    except ValidationError as error:
        first = error.errors()[0]
        within = {str(key) for key in first["loc"]}
        about = [path for path in changed if {path.split(".")[0], path.split(".")[-1]} <= within] or list(changed)
        _refuse({path: overrides[path] for path in about}, "", sentence(first), "give a value that the field takes")


def _refuse(values: Values, message: str, cause: str, remedy: str) -> NoReturn:
    said = " and ".join(f"`{path}` can't be {json.dumps(value)}" for path, value in values.items())
    raise RequestError(said or message, cause="; ".join(part for part in (message, cause) if part), remedy=remedy)


def _stages_of(experiment: Experiment, overrides: Mapping[str, Any]) -> Any:
    try:
        return trial_experiment(experiment, overrides).stages
    except ValueError:  # a wish from before the file was edited
        return None


def _folder(recorded: Recorded) -> Path | None:
    """Where paths in the experiment start; None where its file can't be found from here."""
    file = Path(recorded.state.file)
    return file.parent if file.is_file() else None


def _workers(experiment: Experiment) -> int:
    workers = experiment.compute.workers_per_trial
    return 1 if workers == AUTO else workers


def _to_stop(told: Trials, words: Sequence[str]) -> tuple[str, ...]:
    chosen = [told.named(word) for word in words]
    for trial in chosen:
        if trial.state not in OPEN:
            raise RequestError(
                f"{trial.name} has ended",
                cause=f"it is {trial.state}",
                remedy="stop one of: " + (", ".join(one.name for one in told.trials if one.state in OPEN) or "none"),
            )
    return tuple(dict.fromkeys(trial.name for trial in chosen))


def _values(words: Sequence[str]) -> Values:
    """From `path=value`, the value as an experiment's file has it."""
    found: Values = {}
    for word in words:
        path, equals, text = word.partition("=")
        path = path.strip()
        if not equals or not path:
            raise RequestError(f"`{word}` is no value", remedy="write path=value, such as sft.learning_rate=1e-3")
        if path in found:
            raise RequestError(f"`{path}` is given twice", remedy="a command adds one trial: give it once for each")
        try:
            found[path] = read_yaml(text, word).data
        except SpecError as error:
            raise RequestError(f"`{word}`: {error.message}", cause=error.cause, remedy=error.remedy) from None
    return found


def _check_request(words: Sequence[str], stop: bool, add: bool, clone: str | None) -> None:
    asked = [name for name, given in (("--stop", stop), ("--add", add), ("--clone", clone is not None)) if given]
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} don't go together", remedy="give one of them a command")
    if words and not asked:
        raise RequestError(
            f"what shall become of `{' '.join(words)}`?",
            remedy="give --stop before trials, --add or --clone TRIAL before values",
        )
    if asked and not words:
        needs = "a trial: --stop TRIAL.." if stop else f"a value: {asked[0]}{' TRIAL' if clone else ''} path=value.."
        raise RequestError(f"{asked[0]} needs {needs}", remedy="`tunery trials RUN` lists the trials and their values")

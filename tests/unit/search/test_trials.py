"""`tunery trials`: the list, the commands that it writes for a search, and its errors. Event logs are synthetic."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunery import cli
from tunery.errors import RequestError
from tunery.events.event_log import EventLog
from tunery.events.event_reducer import replay
from tunery.search.space import trial_id
from tunery.search.steering import SearchControl
from tunery.search.trial_commands import TrialCommand, trials
from tunery.search.trials import Trials, list_trials
from tunery.store import Lease, Store

TEXT = """
# Which learning rate?
name: small
seed: 5
stages:
  rows:  {kind: dataset, source: "builtin:python-docs", subset: questions, split: train, limit: 20}
  held:  {kind: dataset, source: "builtin:python-docs", subset: questions, split: validation, limit: 5}
  base:  {kind: pretrain, data: rows, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}
  sft:   {kind: sft, data: rows, model: base, tuner: {lora: {rank: 4}}, epochs: 1, learning_rate: 1e-3,
          global_batch_size: 4, eval_data: held}
  other: {kind: sft, data: rows, model: base, epochs: 1, learning_rate: 1e-3}
search:
  metric: sft.eval_loss
  mode: min
  trials: 4
  space:
    sft.learning_rate: {loguniform: [1e-4, 1e-2]}
    sft.epochs: {choice: [1, 2]}
"""
VALUES: list[dict[str, Any]] = [{"sft.learning_rate": rate, "sft.epochs": 1} for rate in (1e-3, 2e-3, 3e-3, 4e-3)]
NAMES = [trial_id(values) for values in VALUES]


class Workspace:
    """A run with four trials: done, failed, and two running."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store")
        self.folder = self.store.run("small")
        self.control = SearchControl(self.folder)

    def run_started(self, text: str = TEXT, *, search: bool = True) -> Workspace:
        stages = [{"name": name, "kind": "sft"} for name in ("rows", "held", "base", "sft")]
        self.write("run_started", run="small", file="small.yaml", text=text, stages=stages)
        if search:
            self.write("search_started", metric="sft.eval_loss", mode="min", trials=4, space={}, max_concurrent=2)
        return self

    def with_trials(self) -> Workspace:
        self.run_started()
        for name, values in zip(NAMES, VALUES, strict=True):
            self.write("trial_started", trial=name, overrides=values, origin="sampled", of="")
            self.write("stage_started", name, stage="sft", kind="sft", fingerprint="f")
            self.write("progress", name, stage="sft", done=6, total=10, unit="steps")
            for step, loss in ((2, 4.0), (4, 3.5)):
                self.write("metrics", name, stage="sft", step=step, values={"eval_loss": loss, "loss": 1.0})
        self.finish(0, state="done", value=3.25)
        self.finish(1, state="failed", value=None, error="Traceback\nValueError: diverged\n")
        return self

    def finish(self, index: int, **fields: Any) -> None:
        self.write(
            "trial_finished", trial=NAMES[index], overrides=VALUES[index], seconds=9.0, **{"error": "", **fields}
        )

    def write(self, event: str, writer: str = "driver", **values: Any) -> None:
        trial = "" if writer == "driver" else writer
        EventLog(self.folder / "events" / f"{writer}.jsonl", trial=trial).write(event, **values)

    def list(self) -> Trials:
        result = trials("small", self.store, ())
        assert isinstance(result, Trials)
        return result

    def command(self, *words: str, **options: Any) -> TrialCommand:
        result = trials("small", self.store, words, **options)
        assert isinstance(result, TrialCommand)
        return result

    def error_of(self, *words: str, **options: Any) -> RequestError:
        before = self.command_files()
        with pytest.raises(RequestError) as caught:
            trials("small", self.store, words, **options)
        assert self.command_files() == before
        assert caught.value.remedy
        return caught.value

    def command_files(self) -> list[Path]:
        return sorted((self.folder / "steering").glob("*"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path).with_trials()


@pytest.fixture
def running(workspace: Workspace) -> Iterator[Workspace]:
    with Lease(workspace.folder / "lease"):
        yield workspace


def rendered(command: Trials | TrialCommand, width: int) -> str:
    console = Console(width=width, highlight=False, no_color=True)
    with console.capture() as captured:
        console.print(command.render(width))
    return captured.get()


# The list.


def test_running_trials_come_first_with_their_last_value_and_progress(running: Workspace) -> None:
    result = running.list()
    assert [trial.state for trial in result.trials] == ["running", "running", "done", "failed"]
    first, done = result.trials[0], result.trials[2]
    assert (first.value, first.done, first.total, first.unit) == (3.5, 6, 10, "steps")
    assert first.seconds is not None
    assert (done.value, done.seconds, done.best, done.origin) == (3.25, 9.0, True, "sampled")
    assert result.search_state == "running"


def test_training_loss_is_not_the_trial_value(workspace: Workspace) -> None:
    name = trial_id({"sft.epochs": 2})
    workspace.write("trial_started", trial=name, overrides={"sft.epochs": 2}, origin="sampled", of="")
    workspace.write("metrics", name, stage="sft", step=1, values={"loss": 1.0})
    assert workspace.list().find(name).value is None


def test_interrupted_trials_are_pending(workspace: Workspace) -> None:
    result = workspace.list()
    assert [trial.state for trial in result.trials] == ["pending", "pending", "done", "failed"]
    assert result.search_state == "interrupted"
    assert "the search is not running" in rendered(result, 200)


@pytest.mark.parametrize("width", [80, 200])
def test_every_trial_is_listed_with_values_and_error(running: Workspace, width: int) -> None:
    running.command("sft.epochs=2", clone=NAMES[0])
    text = rendered(running.list(), width)
    for name in NAMES:
        assert name in text
    assert f"cloned of {NAMES[0]}" in text
    assert "6/10 steps" in text
    assert "learning_rate=2e-3" in text
    assert "ValueError: diverged" in text
    assert max(map(len, text.splitlines())) <= width


def test_run_without_a_search_is_rejected(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path).run_started(TEXT.partition("search:")[0], search=False)
    assert "has no search" in workspace.error_of().message
    assert workspace.error_of("abc", stop=True).exit_code == 2


def test_trials_of_an_edited_file_are_not_listed(running: Workspace) -> None:
    running.run_started(TEXT.replace("seed: 5", "seed: 6"))
    assert running.list().trials == ()


def test_unknown_run_is_rejected_with_known_runs(workspace: Workspace) -> None:
    with pytest.raises(RequestError) as caught:
        trials("smal", workspace.store, ())
    assert "small" in caught.value.remedy


# Stopping.


@pytest.mark.parametrize("shorten", [str, lambda name: name.removeprefix("trial-"), lambda name: name[:10]])
def test_stop_is_written_for_the_requested_trial(running: Workspace, shorten: Any) -> None:
    result = running.command(shorten(NAMES[2]), stop=True)
    assert result.trials == (NAMES[2],)
    assert running.control.stop_requested(NAMES[2])
    assert running.list().find(NAMES[2]).state == "stopping"
    assert "ends after its current step" in rendered(result, 80)


def test_stop_of_an_ended_or_unknown_trial_is_rejected(running: Workspace) -> None:
    result = running.error_of(NAMES[2], NAMES[0], stop=True)
    assert "has ended" in result.message
    assert result.cause == "it is done"
    assert NAMES[2] in result.remedy
    assert NAMES[2] in running.error_of(NAMES[2][:-1] + "x", stop=True).remedy
    assert "matches 4 trials" in running.error_of("trial-", stop=True).message


def test_stop_is_kept_if_the_search_is_not_running(workspace: Workspace) -> None:
    result = workspace.command(NAMES[2], stop=True)
    assert "kept until `tunery run small.yaml` resumes it" in rendered(result, 200)
    assert workspace.control.stop_requested(NAMES[2])
    assert workspace.list().find(NAMES[2]).state == "stopped"


# Adding.


def test_search_reads_the_added_trial(running: Workspace) -> None:
    result = running.command("sft.learning_rate=5e-3", "sft.tuner={lora: {rank: 8}}", add=True)
    values = {"sft.learning_rate": 5e-3, "sft.tuner": {"lora": {"rank": 8}}}
    assert SearchControl(running.folder).new_trials() == [{"overrides": values, "origin": "added", "of": ""}]
    added = running.list().find(result.trials[0])
    assert (added.state, added.origin, added.overrides) == ("pending", "added", values)


def test_cloned_trial_has_the_original_values_and_the_changes(running: Workspace) -> None:
    running.command("sft.epochs=2", clone=NAMES[3].removeprefix("trial-"))
    (trial,) = SearchControl(running.folder).new_trials()
    assert trial == {"overrides": {"sft.learning_rate": 4e-3, "sft.epochs": 2}, "origin": "cloned", "of": NAMES[3]}


def test_stopped_added_trial_does_not_start(running: Workspace) -> None:
    (name,) = running.command("sft.epochs=2", add=True).trials
    assert "will not start" in rendered(running.command(name, stop=True), 80)
    assert running.list().find(name).state == "stopped"


def test_path_outside_the_space_is_allowed_if_the_metric_depends_on_it(running: Workspace) -> None:
    running.command("rows.limit=10", "sft.max_length=64", add=True)
    result = running.error_of("other.epochs=2", add=True)
    assert result.message == "`other.epochs` can't change `sft.eval_loss`"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sft.epoch=2"], "did you mean `epochs`?"),
        (["sft.epochs=-1"], "`sft.epochs` can't be -1\ncause: it should be greater than 0"),
        (["sft.epochs=many"], '`sft.epochs` can\'t be "many"'),
        (["sft.model=nowhere"], "nowhere"),
        (["sft.eval_data=null"], "no stage would log `sft.eval_loss`"),
        (["sft.epochs"], "is not a path=value pair"),
        (["sft.tuner={lora"], "not valid YAML"),
        (["sft.epochs=2", "sft.epochs=3"], "given twice"),
        ([], "--add needs a value"),
    ],
)
def test_invalid_values_are_rejected(running: Workspace, words: list[str], expected: str) -> None:
    assert expected in str(running.error_of(*words, add=True))


def test_batch_size_is_validated_for_the_workers_of_a_trial(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path).run_started(TEXT + "compute: {workers_per_trial: 2}\n")
    workspace.command("sft.global_batch_size=6", add=True)
    assert "sft.global_batch_size" in workspace.error_of("sft.global_batch_size=7", add=True).message


@pytest.mark.parametrize("epochs", ["1", "1.0"])
def test_values_of_an_existing_trial_are_rejected(running: Workspace, epochs: str) -> None:
    result = running.error_of("sft.learning_rate=2e-3", f"sft.epochs={epochs}", add=True)
    assert result.message == f"{NAMES[1]} has these values already"
    running.command("sft.epochs=2", add=True)
    assert "already" in running.error_of("sft.epochs=2", add=True).message


def test_ended_search_rejects_commands(workspace: Workspace) -> None:
    workspace.finish(2, state="stopped", value=3.5)
    workspace.write("search_finished", best=NAMES[0], value=3.25, seconds=20.0)
    assert "the search has ended" in rendered(workspace.list(), 80)
    assert "has ended" in workspace.error_of("sft.epochs=2", add=True).message
    assert "has ended" in workspace.error_of(NAMES[3], stop=True).message


def test_command_before_the_search_starts_is_kept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path).run_started(search=False)
    with Lease(workspace.folder / "lease"):
        assert "the search has not started" in rendered(workspace.command("sft.epochs=2", add=True), 200)
        assert [trial.state for trial in workspace.list().trials] == ["pending"]


# The command.


def test_command_accepts_values_after_options(
    running: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["tunery", "trials", "small", *words, "--store", str(running.store.root)])
        cli.main()
        return capsys.readouterr().out

    result = json.loads(command("--add", "sft.learning_rate=5e-3", "sft.epochs=2", "--json"))
    assert (result["command"], result["overrides"]) == ("add", {"sft.learning_rate": 5e-3, "sft.epochs": 2})
    command("--clone", NAMES[0], "sft.learning_rate=6e-3")
    command("--stop", NAMES[2], NAMES[3])
    states = {trial["name"]: trial["state"] for trial in json.loads(command("--json"))["trials"]}
    assert sorted(states.values()) == ["done", "failed", "pending", "pending", "stopping", "stopping"]
    assert NAMES[0] in command()
    for words in (["sft.epochs=2"], ["--add", "--stop", "x"], ["--stop", "zz"]):
        with pytest.raises(SystemExit) as caught:
            command(*words)
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_values_that_change_the_evaluation_data_have_a_note(running: Workspace) -> None:
    assert running.command("sft.epochs=2", add=True).notes == ()
    for path in ("sft.max_length", "held.limit"):
        (note,) = running.command(f"{path}=30", add=True).notes
        assert f"`{path}` also changes the data that `sft.eval_loss` is computed on" in note


def test_weighted_sum_is_named_and_has_no_intermediate_value() -> None:
    events: list[dict[str, Any]] = [
        {"event": "run_started", "t": 0.0, "run": "x"},
        {
            "event": "search_started",
            "t": 1.0,
            "metric": "sft.eval_loss",
            "mode": "min",
            "objectives": [{"metric": "eval.sft.a.loss", "mode": "min", "weight": 0.5}],
            "trials": 2,
        },
        {"event": "trial_started", "t": 2.0, "trial": "one", "overrides": {}},
        {"event": "stage_started", "t": 2.0, "trial": "one", "stage": "sft", "kind": "sft"},
        {"event": "metrics", "t": 3.0, "trial": "one", "stage": "sft", "step": 1, "values": {"eval_loss": 3.0}},
        {"event": "trial_started", "t": 2.0, "trial": "two", "overrides": {}},
        {"event": "trial_finished", "t": 4.0, "trial": "two", "overrides": {}, "state": "done", "value": 5.5},
    ]
    result = list_trials(replay(events), events, [], lambda trial: False, "process 1 on host", 5.0)
    assert result.metric == "weighted sum"
    assert {trial.name: trial.value for trial in result.trials} == {"one": None, "two": 5.5}

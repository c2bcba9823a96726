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


class Bench:
    """A run whose first trial is done, its second failed, its third and fourth run."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store")
        self.folder = self.store.run("small")
        self.control = SearchControl(self.folder)

    def begin(self, text: str = TEXT, *, search: bool = True) -> Bench:
        stages = [{"name": name, "kind": "sft"} for name in ("rows", "held", "base", "sft")]
        self.write("run_started", run="small", file="small.yaml", text=text, stages=stages)
        if search:
            self.write("search_started", metric="sft.eval_loss", mode="min", trials=4, space={}, max_concurrent=2)
        return self

    def go(self) -> Bench:
        self.begin()
        for name, values in zip(NAMES, VALUES, strict=True):
            self.write("trial_started", trial=name, overrides=values, origin="drawn", of="")
            self.write("stage_started", name, stage="sft", kind="sft", fingerprint="f")
            self.write("progress", name, stage="sft", done=6, total=10, unit="steps")
            for step, loss in ((2, 4.0), (4, 3.5)):
                self.write("metrics", name, stage="sft", step=step, values={"eval_loss": loss, "loss": 1.0})
        self.finish(0, state="done", value=3.25)
        self.finish(1, state="failed", value=None, error="Traceback\nValueError: too hot\n")
        return self

    def finish(self, index: int, **told: Any) -> None:
        self.write("trial_finished", trial=NAMES[index], overrides=VALUES[index], seconds=9.0, **{"error": "", **told})

    def write(self, event: str, writer: str = "driver", **values: Any) -> None:
        trial = "" if writer == "driver" else writer
        EventLog(self.folder / "events" / f"{writer}.jsonl", trial=trial).write(event, **values)

    def list(self) -> Trials:
        told = trials("small", self.store, ())
        assert isinstance(told, Trials)
        return told

    def wish(self, *words: str, **asked: Any) -> TrialCommand:
        told = trials("small", self.store, words, **asked)
        assert isinstance(told, TrialCommand)
        return told

    def refused(self, *words: str, **asked: Any) -> RequestError:
        before = self.written()
        with pytest.raises(RequestError) as told:
            trials("small", self.store, words, **asked)
        assert self.written() == before
        assert told.value.remedy
        return told.value

    def written(self) -> list[Path]:
        return sorted((self.folder / "steering").glob("*"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path).go()


@pytest.fixture
def running(bench: Bench) -> Iterator[Bench]:
    with Lease(bench.folder / "lease"):
        yield bench


def shown(told: Trials | TrialCommand, width: int) -> str:
    console = Console(width=width, highlight=False, no_color=True)
    with console.capture() as captured:
        console.print(told.render(width))
    return captured.get()


# The list.


def test_running_trials_come_first_with_their_last_value_and_progress(running: Bench) -> None:
    told = running.list()
    assert [trial.state for trial in told.trials] == ["running", "running", "done", "failed"]
    first, done = told.trials[0], told.trials[2]
    assert (first.value, first.done, first.total, first.unit) == (3.5, 6, 10, "steps")
    assert first.seconds is not None
    assert (done.value, done.seconds, done.best, done.origin) == (3.25, 9.0, True, "drawn")
    assert told.search_state == "running"


def test_training_loss_is_not_taken_for_the_value(bench: Bench) -> None:
    name = trial_id({"sft.epochs": 2})
    bench.write("trial_started", trial=name, overrides={"sft.epochs": 2}, origin="drawn", of="")
    bench.write("metrics", name, stage="sft", step=1, values={"loss": 1.0})
    assert bench.list().find(name).value is None


def test_trials_that_were_cut_off_wait(bench: Bench) -> None:
    told = bench.list()
    assert [trial.state for trial in told.trials] == ["waiting", "waiting", "done", "failed"]
    assert told.search_state == "waiting"
    assert "the search is not running" in shown(told, 200)


@pytest.mark.parametrize("width", [80, 200])
def test_every_trial_is_shown_with_its_values_and_why_it_failed(running: Bench, width: int) -> None:
    running.wish("sft.epochs=2", clone=NAMES[0])
    text = shown(running.list(), width)
    for name in NAMES:
        assert name in text
    assert f"cloned of {NAMES[0]}" in text
    assert "6/10 steps" in text
    assert "learning_rate=2e-3" in text
    assert "ValueError: too hot" in text
    assert max(map(len, text.splitlines())) <= width


def test_run_without_a_search_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path).begin(TEXT.partition("search:")[0], search=False)
    assert "has no search" in bench.refused().message
    assert bench.refused("abc", stop=True).exit_code == 2


def test_trials_of_an_edited_file_are_not_listed(running: Bench) -> None:
    running.begin(TEXT.replace("seed: 5", "seed: 6"))
    assert running.list().trials == ()


def test_what_is_no_run_names_those_that_are(bench: Bench) -> None:
    with pytest.raises(RequestError) as told:
        trials("smal", bench.store, ())
    assert "small" in told.value.remedy


# Stopping.


@pytest.mark.parametrize("shorten", [str, lambda name: name.removeprefix("trial-"), lambda name: name[:10]])
def test_stop_is_written_for_the_trial_that_is_meant(running: Bench, shorten: Any) -> None:
    told = running.wish(shorten(NAMES[2]), stop=True)
    assert told.trials == (NAMES[2],)
    assert running.control.stop_requested(NAMES[2])
    assert running.list().find(NAMES[2]).state == "stopping"
    assert "ends after its current step" in shown(told, 80)


def test_stop_of_what_has_ended_or_is_unknown_is_refused_and_stops_nothing(running: Bench) -> None:
    told = running.refused(NAMES[2], NAMES[0], stop=True)
    assert "has ended" in told.message
    assert told.cause == "it is done"
    assert NAMES[2] in told.remedy
    assert NAMES[2] in running.refused(NAMES[2][:-1] + "x", stop=True).remedy
    assert "may be any of 4" in running.refused("trial-", stop=True).message


def test_stop_is_kept_where_nobody_runs_the_search(bench: Bench) -> None:
    told = bench.wish(NAMES[2], stop=True)
    assert "kept until `tunery run small.yaml` resumes it" in shown(told, 200)
    assert bench.control.stop_requested(NAMES[2])
    assert bench.list().find(NAMES[2]).state == "stopped"


# Adding.


def test_added_trial_is_what_the_search_reads(running: Bench) -> None:
    told = running.wish("sft.learning_rate=5e-3", "sft.tuner={lora: {rank: 8}}", add=True)
    values = {"sft.learning_rate": 5e-3, "sft.tuner": {"lora": {"rank": 8}}}
    assert SearchControl(running.folder).new_trials() == [{"overrides": values, "origin": "added", "of": ""}]
    waits = running.list().find(told.trials[0])
    assert (waits.state, waits.origin, waits.overrides) == ("waiting", "added", values)


def test_cloned_trial_has_the_others_values_and_the_changes(running: Bench) -> None:
    running.wish("sft.epochs=2", clone=NAMES[3].removeprefix("trial-"))
    (wish,) = SearchControl(running.folder).new_trials()
    assert wish == {"overrides": {"sft.learning_rate": 4e-3, "sft.epochs": 2}, "origin": "cloned", "of": NAMES[3]}


def test_added_trial_that_is_not_wanted_any_more_will_not_begin(running: Bench) -> None:
    (name,) = running.wish("sft.epochs=2", add=True).trials
    assert "will not start" in shown(running.wish(name, stop=True), 80)
    assert running.list().find(name).state == "stopped"


def test_path_outside_the_space_is_allowed_where_the_metric_depends_on_it(running: Bench) -> None:
    running.wish("rows.limit=10", "sft.max_length=64", add=True)
    told = running.refused("other.epochs=2", add=True)
    assert told.message == "`other.epochs` can't change `sft.eval_loss`"


@pytest.mark.parametrize(
    ("words", "said"),
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
def test_values_that_no_trial_can_have_are_refused(running: Bench, words: list[str], said: str) -> None:
    assert said in str(running.refused(*words, add=True))


def test_batches_are_checked_for_a_trials_workers(tmp_path: Path) -> None:
    bench = Bench(tmp_path).begin(TEXT + "compute: {workers_per_trial: 2}\n")
    bench.wish("sft.global_batch_size=6", add=True)
    assert "sft.global_batch_size" in bench.refused("sft.global_batch_size=7", add=True).message


@pytest.mark.parametrize("epochs", ["1", "1.0"])
def test_values_of_a_trial_that_is_there_are_refused(running: Bench, epochs: str) -> None:
    told = running.refused("sft.learning_rate=2e-3", f"sft.epochs={epochs}", add=True)
    assert told.message == f"{NAMES[1]} has these values already"
    running.wish("sft.epochs=2", add=True)
    assert "already" in running.refused("sft.epochs=2", add=True).message


def test_ended_search_takes_no_wishes(bench: Bench) -> None:
    bench.finish(2, state="stopped", value=3.5)
    bench.write("search_finished", best=NAMES[0], value=3.25, seconds=20.0)
    assert "the search has ended" in shown(bench.list(), 80)
    assert "has ended" in bench.refused("sft.epochs=2", add=True).message
    assert "has ended" in bench.refused(NAMES[3], stop=True).message


def test_wish_before_the_search_begins_is_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path).begin(search=False)
    with Lease(bench.folder / "lease"):
        assert "the search has not started" in shown(bench.wish("sft.epochs=2", add=True), 200)
        assert [trial.state for trial in bench.list().trials] == ["waiting"]


# The command.


def test_command_takes_values_after_its_options(
    running: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["tunery", "trials", "small", *words, "--store", str(running.store.root)])
        cli.main()
        return capsys.readouterr().out

    told = json.loads(command("--add", "sft.learning_rate=5e-3", "sft.epochs=2", "--json"))
    assert (told["command"], told["overrides"]) == ("add", {"sft.learning_rate": 5e-3, "sft.epochs": 2})
    command("--clone", NAMES[0], "sft.learning_rate=6e-3")
    command("--stop", NAMES[2], NAMES[3])
    states = {trial["name"]: trial["state"] for trial in json.loads(command("--json"))["trials"]}
    assert sorted(states.values()) == ["done", "failed", "stopping", "stopping", "waiting", "waiting"]
    assert NAMES[0] in command()
    for words in (["sft.epochs=2"], ["--add", "--stop", "x"], ["--stop", "zz"]):
        with pytest.raises(SystemExit) as ended:
            command(*words)
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_values_that_change_what_is_measured_on_are_told(running: Bench) -> None:
    assert running.wish("sft.epochs=2", add=True).notes == ()
    for path in ("sft.max_length", "held.limit"):
        (note,) = running.wish(f"{path}=30", add=True).notes
        assert f"`{path}` also changes the data that `sft.eval_loss` is computed on" in note


def test_a_weighted_sum_is_called_so_and_has_no_value_before_the_end() -> None:
    events: list[dict[str, Any]] = [
        {"event": "run_started", "t": 0.0, "run": "x"},
        {
            "event": "search_started",
            "t": 1.0,
            "metric": "sft.eval_loss",
            "mode": "min",
            "also": [{"metric": "eval.sft.a.loss", "mode": "min", "weight": 0.5}],
            "trials": 2,
        },
        {"event": "trial_started", "t": 2.0, "trial": "one", "overrides": {}},
        {"event": "stage_started", "t": 2.0, "trial": "one", "stage": "sft", "kind": "sft"},
        {"event": "metrics", "t": 3.0, "trial": "one", "stage": "sft", "step": 1, "values": {"eval_loss": 3.0}},
        {"event": "trial_started", "t": 2.0, "trial": "two", "overrides": {}},
        {"event": "trial_finished", "t": 4.0, "trial": "two", "overrides": {}, "state": "done", "value": 5.5},
    ]
    told = list_trials(replay(events), events, [], lambda trial: False, "somebody", 5.0)
    assert told.metric == "weighted sum"
    assert {trial.name: trial.value for trial in told.trials} == {"one": None, "two": 5.5}

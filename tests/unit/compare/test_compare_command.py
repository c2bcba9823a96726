"""`tunery compare`: resolving the two sides, comparing results, fields and rows. Artifacts are written by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tunery import cli
from tunery.compare.compare_command import Comparison, compare, render
from tunery.compare.fields import Field
from tunery.compare.row_sets import Median
from tunery.compare.side_metrics import Metric, MetricValue
from tunery.errors import RequestError
from tunery.events.event_log import EventLog
from tunery.search.space import trial_id
from tunery.spec import Experiment
from tunery.spec.loader import parse
from tunery.spec.overrides import with_overrides
from tunery.spec.yaml_source import read_yaml
from tunery.store import Store, fingerprint
from tunery.store.rows import row_id, write_rows

TEXT = """
# Which rows?
name: one
seed: 5
stages:
  rows:   {kind: dataset, source: "builtin:python-docs", subset: questions, split: train}
  held:   {kind: dataset, source: "builtin:python-docs", subset: questions, split: validation}
  scored: {kind: score, data: rows, by: [{length: words}]}
  clean:  {kind: select, data: scored, keep: {length: {range: [3, 6]}}}
  base:   {kind: pretrain, data: rows, model: {scratch: tiny}, epochs: 1, learning_rate: auto}
  sft:    {kind: sft, data: clean, model: base, epochs: 1, learning_rate: auto, eval_data: held}
  eval:   {kind: evaluate, models: [base, sft], data: {held: held}}
"""
SEARCH = """
search:
  metric: sft.eval_loss
  mode: min
  trials: 2
  space: {sft.learning_rate: {choice: [3e-3, 5e-3]}, clean.keep.length.range: {choice: [[1, 4], [5, 9]]}}
"""
VALUES: list[dict[str, Any]] = [
    {"sft.learning_rate": 3e-3, "clean.keep.length.range": [1, 4]},
    {"sft.learning_rate": 5e-3, "clean.keep.length.range": [5, 9]},
]
NAMES = [trial_id(values) for values in VALUES]
ROWS = [{"text": " ".join(["word"] * count), "source": "words.txt", "line": count} for count in range(1, 11)]
"""The first has one word, the last ten."""


class Run:
    """Makes artifacts of an experiment as stages leave them, and tells of them in the run's event log."""

    def __init__(self, store: Store, name: str, text: str = TEXT, content: str = "") -> None:
        self.content = content
        self.store, self.folder, self.text = store, store.run(name), text
        self.experiment = parse(read_yaml(text, ""))
        self.write("driver", "run_started", run=name, file=f"{name}.yaml", text=text, stages=self.stages)

    @property
    def stages(self) -> list[dict[str, str]]:
        return [{"name": name, "kind": stage.kind} for name, stage in self.experiment.stages.items()]

    def made(
        self, experiment: Experiment | None = None, writer: str = "driver", *, without: tuple[str, ...] = ()
    ) -> Run:
        experiment = experiment or self.experiment
        for name, stage in experiment.stages.items():
            if name in without:
                continue
            print_ = self.print_of(experiment, name)
            artifact = self.store.find(stage.kind, print_)
            if artifact is None:
                out = self.store.staging_dir(stage.kind, print_) / "out"
                out.mkdir(parents=True)
                facts = make(name, experiment, out)
                manifest = {"kind": stage.kind, "fingerprint": print_, "inputs": {}, "facts": facts}
                artifact = self.store.commit(out, manifest, {})
            told = {"kind": stage.kind, "fingerprint": print_, "artifact": str(artifact.path), "facts": artifact.facts}
            self.write(writer, "stage_finished", stage=name, **told)
        return self

    def search(self, *, best: int = 0, **more: Any) -> Run:
        self.write("driver", "search_started", metric="sft.eval_loss", mode="min", trials=2, space={})
        for name, values in zip(NAMES, VALUES, strict=True):
            self.made(with_overrides(self.experiment, values), name, without=("eval",))
            told = {"overrides": values, "state": "done", "value": values["sft.learning_rate"], "error": ""}
            self.write("driver", "trial_finished", trial=name, **told)
        winner = with_overrides(self.experiment, VALUES[best])
        prints = {name: self.print_of(winner, name) for name in winner.stages}
        self.write("driver", "search_finished", best=NAMES[best], value=1.0, best_fingerprints=prints, **more)
        return self

    def remove(self, kind: str) -> None:
        for path in (self.store.root / "artifacts").glob(f"{kind}-*"):
            shutil.rmtree(path)

    def print_of(self, experiment: Experiment, name: str) -> str:
        own = {"name": name, "content": self.content, "seed": 0 if name in ("rows", "held") else experiment.seed}
        return fingerprint("made", {**own, "fields": experiment.stages[name].model_dump(mode="json")}, {})

    def write(self, writer: str, event: str, **values: Any) -> None:
        trial = writer if writer.startswith("trial") else ""
        EventLog(self.folder / "events" / f"{writer}.jsonl", trial=trial).write(event, **values)


def make(name: str, experiment: Experiment, out: Path) -> dict[str, Any]:
    """What the stage leaves in `out`; its facts."""
    stage: Any = experiment.stages[name]
    rows = [{**row, "id": row_id(row)} for row in ROWS]
    if name == "clean":
        low, high = stage.keep["length"].range
        rows = [row for row in rows if low <= row["line"] <= high]
    if name in ("rows", "scored", "clean"):
        write_rows(rows, out)
    if name == "scored":
        (out / "scores").mkdir()
        table = pa.table({"id": [row["id"] for row in rows], "length": [float(row["line"]) for row in rows]})
        pq.write_table(table, out / "scores" / "part-00000.parquet")
    if name in ("base", "sft"):
        rate = 2e-3 if stage.learning_rate == "auto" else stage.learning_rate
        return {"eval_loss": 1000 * rate, "resolved": {"learning_rate": {"value": rate, "rule": "small"}}}
    if name == "eval":
        results = [{"model": model, "set": "held", "loss": loss} for model, loss in (("base", 4.0), ("sft", 3.0))]
        return {"results": results}
    return {"rows": len(rows)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`one` keeps rows of 3 to 6 words, `other` of 4 to 9, `all` does not filter."""
    store = Store(tmp_path / "store")
    Run(store, "one").made()
    Run(store, "other", TEXT.replace("[3, 6]", "[4, 9]").replace("seed: 5", "seed: 6")).made()
    Run(store, "all", TEXT.replace("data: clean", "data: rows").replace("  clean", "  kept")).made()
    return store


def refused(left: str, right: str, store: Store) -> RequestError:
    with pytest.raises(RequestError) as told:
        compare(left, right, store)
    assert told.value.exit_code == 2
    assert told.value.remedy
    return told.value


def shown(told: Comparison, width: int) -> str:
    console = Console(width=width, highlight=False, no_color=True)
    with console.capture() as captured:
        console.print(render(told))
    return captured.get()


# Rows.


def test_rows_of_both_and_of_each_alone_are_counted_with_their_median_scores(store: Store) -> None:
    base, sft = compare("one", "other", store).rows
    assert (base.both, base.left.only, base.right.only) == (10, 0, 0)
    assert (sft.both, sft.left.only, sft.right.only, sft.left.rows, sft.right.rows) == (3, 1, 3, 4, 6)
    assert sft.left.scores == {"length": Median(3.0, 5.0)}
    assert sft.right.scores == {"length": Median(8.0, 5.0)}
    assert [(sample.source, sample.line) for sample in sft.right.samples] == [
        ("words.txt", count) for count in (7, 8, 9)
    ]
    assert sft.left.samples[0].text == "word word word"
    assert sft.left.samples[0].id == row_id(ROWS[2])


def test_rows_that_only_the_unfiltered_side_has_take_the_scores_of_the_filter(store: Store) -> None:
    sft = compare("all", "one", store).rows[1]
    assert (sft.both, sft.left.only, sft.right.only) == (4, 6, 0)
    assert sft.left.scores == {"length": Median(7.5, 4.5)}
    assert len(sft.left.samples) == 3


def test_unfinished_training_has_rows_and_one_whose_rows_are_missing_is_noted(store: Store) -> None:
    Run(store, "begun").made(without=("sft", "eval"))
    assert [rows.stage for rows in compare("begun", "one", store).rows] == ["base", "sft"]
    Run(store, "barely").made(without=("clean", "sft", "eval"))
    told = compare("barely", "one", store)
    assert [rows.stage for rows in told.rows] == ["base"]
    assert told.notes == ["sft: its rows are not built in barely"]


def test_removed_rows_are_refused(store: Store) -> None:
    Run(store, "more").remove("select")
    told = refused("one", "other", store)
    assert "the artifact of `clean` of one is no longer in the store" in told.message
    assert "tunery run one.yaml" in told.remedy


# What was measured, and with which values.


def test_metrics_stand_side_by_side_by_their_names(store: Store) -> None:
    edited = TEXT.replace("epochs: 1, learning_rate: auto, eval", "epochs: 1, learning_rate: 1e-3, eval")
    Run(store, "slow", edited).made(without=("eval",))
    found = {metric.name: metric for metric in compare("one", "slow", store).metrics}
    assert found["sft.eval_loss"] == Metric("sft.eval_loss", MetricValue(2.0), MetricValue(1.0))
    assert found["sft.eval_loss"].difference == -1.0
    assert found["eval.sft.held.loss"].right is None


def test_run_stands_for_its_best_trial_and_its_mean_over_seeds(store: Store) -> None:
    standing = {"trial": NAMES[1], "mean": 5.5, "half": 0.25, "values": [5.0, 6.0]}
    Run(store, "searched", TEXT + SEARCH).made().search(best=1, standings=[standing])
    told = compare("searched", "one", store)
    found = {metric.name: metric.left for metric in told.metrics}
    assert found["sft.eval_loss"] == MetricValue(5.0)
    assert found["sft.eval_loss, mean of 2 seeds"] == MetricValue(5.5, 0.25)
    assert "5.50 ± 0.25" in shown(told, 200)
    assert f"with the values of its best trial, {NAMES[1]}" in shown(told, 200)
    assert Field("search", "for sft.eval_loss", None) in told.fields.differ
    assert told.rows[1].both == 2


def test_two_trials_of_a_run_and_the_files_own_values(store: Store) -> None:
    Run(store, "searched", TEXT + SEARCH).made().search()
    told = compare(f"searched/{NAMES[0]}", f"searched/{NAMES[1].removeprefix('trial-')[:6]}", store)
    assert [(field.path, field.left, field.right) for field in told.fields.differ] == [
        ("clean.keep.length.range", [1.0, 4.0], [5.0, 9.0]),
        ("sft.learning_rate", 3e-3, 5e-3),
    ]
    assert told.names == (NAMES[0], NAMES[1])
    assert (told.rows[1].both, told.rows[1].left.only, told.rows[1].right.only) == (0, 4, 5)
    own = compare("searched/file", f"searched/{NAMES[0]}", store)
    assert own.names == ("file", NAMES[0])
    assert ("sft.learning_rate", "0.002 (auto)", 3e-3) in [(f.path, f.left, f.right) for f in own.fields.differ]


def test_unknown_runs_and_trials_are_refused(store: Store) -> None:
    Run(store, "searched", TEXT + SEARCH).made().search()
    assert "all, one, other, searched" in refused("on", "one", store).remedy
    assert "there is no run `on`" in refused("on/trial-1", "one", store).message
    assert NAMES[0] in refused(f"searched/{NAMES[0]}0", "one", store).remedy
    assert "has no trial `trial-1`" in refused("one/trial-1", "one", store).message


# Fields.


def test_fields_differ_by_path_and_stages_of_one_side_are_named(store: Store) -> None:
    told = compare("one", "other", store).fields
    assert told.differ == (Field("seed", 5, 6), Field("clean.keep.length.range", [3.0, 6.0], [4.0, 9.0]))
    told = compare("one", "all", store).fields
    assert (told.only_left, told.only_right) == (("clean",), ("kept",))
    assert told.differ == (Field("sft.data", "clean", "rows"),)


def test_part_of_an_experiment_that_is_another_one_altogether_is_told_whole(store: Store) -> None:
    Run(store, "lora", TEXT.replace("sft, data: clean", "sft, tuner: {lora: {rank: 4}}, data: clean")).made()
    (field,) = compare("one", "lora", store).fields.differ
    assert (field.path, field.left, field.right["lora"]["rank"]) == ("sft.tuner", "full", 4)


def test_other_content_under_the_same_name_is_told(store: Store) -> None:
    Run(store, "later", content="edited").made()
    differ = compare("one", "later", store).fields.differ
    assert [field.path for field in differ] == ["rows: content of its files", "held: content of its files"]


def test_run_beside_itself_differs_in_nothing(store: Store) -> None:
    told = compare("one", str(store.run("one")), store)
    assert told.fields.differ == ()
    assert {metric.difference for metric in told.metrics} == {0}
    assert all(not rows.left.only and not rows.right.only for rows in told.rows)


# The command.


@pytest.mark.parametrize("width", [80, 200])
def test_everything_is_shown_within_the_width(store: Store, width: int) -> None:
    text = shown(compare("one", "other", store), width)
    for said in ("clean.keep.length.range", "[3.0, 6.0]", "sft: 3 rows only in other", "median length 8"):
        assert said in text
    assert max(map(len, text.splitlines())) <= width


def test_command_tells_json_or_tables_and_ends_with_2_where_there_is_no_such_run(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tunery", "compare", *words, "--store", str(store.root)])
        cli.main()
        return capsys.readouterr().out

    told = json.loads(command("one", "other", "--json"))
    assert told["left"] == {"run": "one", "trial": None, "overrides": {}}
    assert told["rows"][1]["right"]["scores"]["length"]["only"] == 8.0
    assert told["metrics"][0].keys() == {"name", "left", "right", "difference"}
    assert "Fields that differ" in command("one", "other")
    with pytest.raises(SystemExit) as ended:
        command("one", "nothing")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")

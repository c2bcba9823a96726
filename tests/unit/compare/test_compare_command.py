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
from tunery.compare.fields import FieldDifference
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
"""Rows of 1 to 10 words."""


class Run:
    """A run with handwritten artifacts and an event log."""

    def __init__(self, store: Store, name: str, text: str = TEXT, content: str = "") -> None:
        self.content = content
        self.store, self.folder, self.text = store, store.run(name), text
        self.experiment = parse(read_yaml(text, ""))
        self.write("driver", "run_started", run=name, file=f"{name}.yaml", text=text, stages=self.stages)

    @property
    def stages(self) -> list[dict[str, str]]:
        return [{"name": name, "kind": stage.kind} for name, stage in self.experiment.stages.items()]

    def finish_stages(
        self, experiment: Experiment | None = None, writer: str = "driver", *, without: tuple[str, ...] = ()
    ) -> Run:
        experiment = experiment or self.experiment
        for name, stage in experiment.stages.items():
            if name in without:
                continue
            cache_key = self.fingerprint_of(experiment, name)
            artifact = self.store.find(stage.kind, cache_key)
            if artifact is None:
                out = self.store.staging_dir(stage.kind, cache_key) / "out"
                out.mkdir(parents=True)
                facts = write_output(name, experiment, out)
                manifest = {"kind": stage.kind, "fingerprint": cache_key, "inputs": {}, "facts": facts}
                with self.store.lease(manifest["kind"], manifest["fingerprint"]) as lease:
                    artifact = self.store.commit(out, manifest, {}, lease)
            values = {
                "kind": stage.kind,
                "fingerprint": cache_key,
                "artifact": str(artifact.path),
                "facts": artifact.facts,
            }
            self.write(writer, "stage_finished", stage=name, **values)
        return self

    def search(self, *, best: int = 0, **more: Any) -> Run:
        self.write("driver", "search_started", metric="sft.eval_loss", mode="min", trials=2, space={})
        for name, values in zip(NAMES, VALUES, strict=True):
            self.finish_stages(with_overrides(self.experiment, values), name, without=("eval",))
            event = {"overrides": values, "state": "done", "value": values["sft.learning_rate"], "error": ""}
            self.write("driver", "trial_finished", trial=name, **event)
        winner = with_overrides(self.experiment, VALUES[best])
        best_fingerprints = {name: self.fingerprint_of(winner, name) for name in winner.stages}
        self.write(
            "driver", "search_finished", best=NAMES[best], value=1.0, best_fingerprints=best_fingerprints, **more
        )
        return self

    def remove(self, kind: str) -> None:
        for path in (self.store.root / "artifacts").glob(f"{kind}-*"):
            shutil.rmtree(path)

    def fingerprint_of(self, experiment: Experiment, name: str) -> str:
        identity = {"name": name, "content": self.content, "seed": 0 if name in ("rows", "held") else experiment.seed}
        return fingerprint("test", {**identity, "fields": experiment.stages[name].model_dump(mode="json")}, {})

    def write(self, writer: str, event: str, **values: Any) -> None:
        trial = writer if writer.startswith("trial") else ""
        EventLog(self.folder / "events" / f"{writer}.jsonl", trial=trial).write(event, **values)


def write_output(name: str, experiment: Experiment, out: Path) -> dict[str, Any]:
    """Write the output of a stage to `out` and return its facts."""
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
    """Return a store with three runs: `one` keeps rows of 3 to 6 words, `other` of 4 to 9, `all` does not filter."""
    store = Store(tmp_path / "store")
    Run(store, "one").finish_stages()
    Run(store, "other", TEXT.replace("[3, 6]", "[4, 9]").replace("seed: 5", "seed: 6")).finish_stages()
    Run(store, "all", TEXT.replace("data: clean", "data: rows").replace("  clean", "  kept")).finish_stages()
    return store


def error_of(left: str, right: str, store: Store) -> RequestError:
    with pytest.raises(RequestError) as caught:
        compare(left, right, store)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return caught.value


def rendered(comparison: Comparison, width: int) -> str:
    console = Console(width=width, highlight=False, no_color=True)
    with console.capture() as captured:
        console.print(render(comparison))
    return captured.get()


# Rows.


def test_shared_and_exclusive_rows_are_counted_with_median_scores(store: Store) -> None:
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


def test_exclusive_rows_of_the_unfiltered_side_have_the_scores_of_the_filter(store: Store) -> None:
    sft = compare("all", "one", store).rows[1]
    assert (sft.both, sft.left.only, sft.right.only) == (4, 6, 0)
    assert sft.left.scores == {"length": Median(7.5, 4.5)}
    assert len(sft.left.samples) == 3


def test_training_without_rows_is_noted_and_an_unfinished_one_is_compared(store: Store) -> None:
    Run(store, "unfinished").finish_stages(without=("sft", "eval"))
    assert [rows.stage for rows in compare("unfinished", "one", store).rows] == ["base", "sft"]
    Run(store, "started").finish_stages(without=("clean", "sft", "eval"))
    comparison = compare("started", "one", store)
    assert [rows.stage for rows in comparison.rows] == ["base"]
    assert comparison.notes == ["sft: its rows are not built in started"]


def test_removed_rows_are_an_error(store: Store) -> None:
    Run(store, "more").remove("select")
    error = error_of("one", "other", store)
    assert "the artifact of `clean` of one is no longer in the store" in error.message
    assert "tunery run one.yaml" in error.remedy


# Metrics and values.


def test_metrics_are_compared_by_name(store: Store) -> None:
    edited = TEXT.replace("epochs: 1, learning_rate: auto, eval", "epochs: 1, learning_rate: 1e-3, eval")
    Run(store, "slow", edited).finish_stages(without=("eval",))
    metrics = {metric.name: metric for metric in compare("one", "slow", store).metrics}
    assert metrics["sft.eval_loss"] == Metric("sft.eval_loss", MetricValue(2.0), MetricValue(1.0))
    assert metrics["sft.eval_loss"].difference == -1.0
    assert metrics["eval.sft.held.loss"].right is None


def test_run_with_a_search_selects_its_best_trial_and_the_mean_over_seeds(store: Store) -> None:
    standing = {"trial": NAMES[1], "mean": 5.5, "ci_half_width": 0.25, "values": [5.0, 6.0]}
    Run(store, "searched", TEXT + SEARCH).finish_stages().search(best=1, standings=[standing])
    comparison = compare("searched", "one", store)
    metrics = {metric.name: metric.left for metric in comparison.metrics}
    assert metrics["sft.eval_loss"] == MetricValue(5.0)
    assert metrics["sft.eval_loss, mean of 2 seeds"] == MetricValue(5.5, 0.25)
    assert "5.50 ± 0.25" in rendered(comparison, 200)
    assert f"with the values of its best trial, {NAMES[1]}" in rendered(comparison, 200)
    assert FieldDifference("search", "for sft.eval_loss", None) in comparison.fields.differ
    assert comparison.rows[1].both == 2


def test_trials_of_a_run_and_the_values_of_its_file_are_compared(store: Store) -> None:
    Run(store, "searched", TEXT + SEARCH).finish_stages().search()
    comparison = compare(f"searched/{NAMES[0]}", f"searched/{NAMES[1].removeprefix('trial-')[:6]}", store)
    assert [(field.path, field.left, field.right) for field in comparison.fields.differ] == [
        ("clean.keep.length.range", [1.0, 4.0], [5.0, 9.0]),
        ("sft.learning_rate", 3e-3, 5e-3),
    ]
    assert comparison.names == (NAMES[0], NAMES[1])
    assert (comparison.rows[1].both, comparison.rows[1].left.only, comparison.rows[1].right.only) == (0, 4, 5)
    comparison = compare("searched/file", f"searched/{NAMES[0]}", store)
    assert comparison.names == ("file", NAMES[0])
    assert ("sft.learning_rate", "0.002 (auto)", 3e-3) in [(f.path, f.left, f.right) for f in comparison.fields.differ]


def test_unknown_runs_and_trials_are_errors(store: Store) -> None:
    Run(store, "searched", TEXT + SEARCH).finish_stages().search()
    assert "all, one, other, searched" in error_of("on", "one", store).remedy
    assert "there is no run `on`" in error_of("on/trial-1", "one", store).message
    assert NAMES[0] in error_of(f"searched/{NAMES[0]}0", "one", store).remedy
    assert "has no trial `trial-1`" in error_of("one/trial-1", "one", store).message


# Fields.


def test_differing_fields_are_listed_by_path_and_exclusive_stages_by_name(store: Store) -> None:
    comparison = compare("one", "other", store).fields
    assert comparison.differ == (
        FieldDifference("seed", 5, 6),
        FieldDifference("clean.keep.length.range", [3.0, 6.0], [4.0, 9.0]),
    )
    comparison = compare("one", "all", store).fields
    assert (comparison.only_left, comparison.only_right) == (("clean",), ("kept",))
    assert comparison.differ == (FieldDifference("sft.data", "clean", "rows"),)


def test_values_of_different_types_are_compared_as_a_whole(store: Store) -> None:
    Run(store, "lora", TEXT.replace("sft, data: clean", "sft, tuner: {lora: {rank: 4}}, data: clean")).finish_stages()
    (field,) = compare("one", "lora", store).fields.differ
    assert (field.path, field.left, field.right["lora"]["rank"]) == ("sft.tuner", "full", 4)


def test_different_content_of_files_is_a_difference(store: Store) -> None:
    Run(store, "later", content="edited").finish_stages()
    differ = compare("one", "later", store).fields.differ
    assert [field.path for field in differ] == ["rows: content of its files", "held: content of its files"]


def test_run_does_not_differ_from_itself(store: Store) -> None:
    comparison = compare("one", str(store.run("one")), store)
    assert comparison.fields.differ == ()
    assert {metric.difference for metric in comparison.metrics} == {0}
    assert all(not rows.left.only and not rows.right.only for rows in comparison.rows)


# The command.


@pytest.mark.parametrize("width", [80, 200])
def test_output_fits_the_terminal_width(store: Store, width: int) -> None:
    text = rendered(compare("one", "other", store), width)
    for words in ("clean.keep.length.range", "[3.0, 6.0]", "sft: 3 rows only in other", "median length 8"):
        assert words in text
    assert max(map(len, text.splitlines())) <= width


def test_command_prints_json_or_tables_and_exits_with_2_for_an_unknown_run(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tunery", "compare", *words, "--store", str(store.root)])
        cli.main()
        return capsys.readouterr().out

    output = json.loads(command("one", "other", "--json"))
    assert output["left"] == {"run": "one", "trial": None, "overrides": {}}
    assert output["rows"][1]["right"]["scores"]["length"]["only"] == 8.0
    assert output["metrics"][0].keys() == {"name", "left", "right", "difference"}
    assert "Fields that differ" in command("one", "other")
    with pytest.raises(SystemExit) as caught:
        command("one", "nothing")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")

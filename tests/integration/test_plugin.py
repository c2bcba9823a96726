"""A scorer and tuners of a plugin, in a separate distribution, are used like builtin ones, with no change to tunery."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from workspace import ROOT, Workspace

from tunery.models.load import load_model

PLUGIN = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT / 'tests' / 'plugins' / 'toy_plugin'}"}
TEXT = """
name: toy
seed: 17
stages:
  texts: {kind: dataset, source: "builtin:python-docs", subset: texts, limit: 60}
  rows: {kind: dataset, source: "builtin:python-docs", subset: questions, limit: 24}
  base: {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 1, learning_rate: 2.0e-3, global_batch_size: 8,
         max_length: 128}
  scored: {kind: score, data: rows, by: [{vowels: share}, {vowels: count, name: vowel_count}]}
  kept: {kind: select, data: scored, keep: {vowels: {top_k: 8}}}
  norms: {kind: sft, data: kept, model: base, epochs: 1, learning_rate: auto, global_batch_size: 4, tuner: norms}
  ia3: {kind: sft, data: kept, model: base, epochs: 1, learning_rate: 1.0e-2, global_batch_size: 4,
        tuner: {ia3: {target_modules: [k_proj, down_proj]}}}
compute: {workers: 1, device: cpu}
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    bench = Workspace(tmp_path_factory.mktemp("plugin"))
    bench.file.write_text(TEXT)
    return bench


@pytest.fixture(scope="module")
def built(bench: Workspace) -> dict[str, dict]:
    return bench.without_ray(bench.store, **PLUGIN)


def test_without_the_plugin_its_kinds_are_unknown(bench: Workspace) -> None:
    done = bench.tunery("validate", str(bench.file))
    assert done.returncode == 2
    assert "a scorer is a mapping whose first key is its kind" in done.stderr
    assert "`stages.norms.tuner` can't be" in done.stderr


def test_experiment_with_its_kinds_is_validated_and_planned(bench: Workspace) -> None:
    done = bench.tunery("validate", str(bench.file), **PLUGIN)
    assert done.returncode == 0, done.stderr
    done = bench.tunery("plan", str(bench.file), **PLUGIN)
    assert done.returncode == 0, done.stderr
    assert "norms.learning_rate = 0.001 (norms: fifty times full fine-tuning's rate)" in done.stdout


def test_wrong_settings_of_its_kinds_are_reported_like_those_of_builtin_ones(bench: Workspace) -> None:
    wrong = bench.folder / "wrong.yaml"
    wrong.write_text(TEXT.replace("vowels: share", "vowels: shore").replace("[k_proj, down_proj]", "[k_prj]"))
    done = bench.tunery("validate", str(wrong), **PLUGIN)
    assert '`stages.scored.by.0.vowels` can\'t be "shore"' in done.stderr
    wrong.write_text(TEXT.replace("[k_proj, down_proj]", "[k_prj]"))
    done = bench.tunery("validate", str(wrong), **PLUGIN)
    assert "`k_prj` matches no layer" in done.stderr


def test_its_scorer_scores_rows_and_a_rule_uses_its_direction(built: dict[str, dict]) -> None:
    folder = Path(built["scored"]["path"]) / "scores"
    table = pq.read_table(folder).to_pydict()
    assert len(table["vowels"]) == 24
    assert table["vowels"] == pytest.approx(
        [count / letters for count, letters in zip(table["vowel_count"], table["vowels_letters"], strict=True)]
    )
    best = sorted(zip(table["vowels"], table["id"], strict=True), reverse=True)[:8]
    kept = pq.read_table(Path(built["kept"]["path"]) / "rows", columns=["id"])["id"].to_pylist()
    assert set(kept) == {row for _, row in best}


def test_tuner_without_adapter_trains_its_parameters_only_and_saves_the_model(built: dict[str, dict]) -> None:
    before, after = (weights(built[name]["path"]) for name in ("base", "norms"))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "norm" in name}
    assert (Path(built["norms"]["path"]) / "model").is_dir()
    assert built["norms"]["facts"]["steps"] == 2
    assert_reloaded(built["norms"]["path"])


def test_tuner_with_adapter_saves_the_adapter_which_is_merged_when_it_is_loaded(built: dict[str, dict]) -> None:
    path = Path(built["ia3"]["path"])
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], sorted(config["target_modules"])) == ("IA3", ["down_proj", "k_proj"])
    before, after = weights(built["base"]["path"]), weights(str(path))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "k_proj" in name or "down_proj" in name}
    assert built["ia3"]["facts"]["trainable"] < built["norms"]["facts"]["parameters"] / 100
    assert_reloaded(str(path))


def test_filter_uses_its_scorer_on_ray_workers(bench: Workspace) -> None:
    rows = bench.folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("aeiou", "tsk tsk", "banana", "rhythm")))
    done = bench.tunery("filter", str(rows), "--out", "good.jsonl", "--by", "vowels", **PLUGIN)
    assert done.returncode == 0, done.stderr
    good = [json.loads(line)["text"] for line in (bench.folder / "good.jsonl").read_text().splitlines()]
    assert good == ["aeiou", "banana"]


def weights(path: str) -> dict[str, torch.Tensor]:
    return dict(load_model({"artifact": path}, torch.float32).state_dict())


def assert_reloaded(path: str) -> None:
    runtime_stats = json.loads((Path(path) / "runtime_stats.json").read_text())
    assert runtime_stats["reload_check"].startswith("passed")

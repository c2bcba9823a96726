"""A scorer, tuners and a trainer of a plugin, a separate distribution, are used like builtin ones, without a change."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
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
  smooth: {kind: smoothed_sft, data: kept, eval_data: kept, model: base, epochs: auto, learning_rate: auto,
           global_batch_size: 4, smoothing: 0.5}
  eval: {kind: evaluate, models: [base, smooth], data: {kept: kept}}
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
    assert "there is no stage kind `smoothed_sft`" in done.stderr


def test_experiment_with_its_kinds_is_validated_and_planned(bench: Workspace) -> None:
    done = bench.tunery("validate", str(bench.file), **PLUGIN)
    assert done.returncode == 0, done.stderr
    done = bench.tunery("plan", str(bench.file), **PLUGIN)
    assert done.returncode == 0, done.stderr
    assert "norms.learning_rate = 0.001 (norms: fifty times full fine-tuning's rate)" in done.stdout
    assert "smooth.learning_rate = 3e-05 (label smoothing)" in done.stdout
    assert "smooth.epochs = 1.0 (one pass)" in done.stdout
    assert re.search(r"smooth +smoothed_sft +24 +6 ", done.stdout)


def test_wrong_settings_of_its_kinds_are_reported_like_those_of_builtin_ones(bench: Workspace) -> None:
    wrong = bench.folder / "wrong.yaml"
    wrong.write_text(TEXT.replace("vowels: share", "vowels: shore").replace("[k_proj, down_proj]", "[k_prj]"))
    done = bench.tunery("validate", str(wrong), **PLUGIN)
    assert '`stages.scored.by.0.vowels` can\'t be "shore"' in done.stderr
    wrong.write_text(TEXT.replace("smoothing: 0.5", "smoothing: 1.5"))
    done = bench.tunery("validate", str(wrong), **PLUGIN)
    assert "`stages.smooth.smoothing` can't be 1.5" in done.stderr
    wrong.write_text(TEXT.replace("{kind: smoothed_sft, data: kept", "{kind: smoothed_sft, data: texts"))
    done = bench.tunery("validate", str(wrong), **PLUGIN)
    assert "`smooth.data` needs conversations, but subset `texts` holds texts" in done.stderr
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


def test_search_can_use_the_metric_of_its_trainer(bench: Workspace) -> None:
    searched = bench.folder / "searched.yaml"
    space = "{smooth.smoothing: {uniform: [0.1, 0.5]}}"
    searched.write_text(f"{TEXT}search: {{metric: smooth.eval_loss, mode: min, trials: 2, space: {space}}}\n")
    done = bench.tunery("plan", str(searched), **PLUGIN)
    assert done.returncode == 0, done.stderr
    assert "a smoothed_sft stage has no packed form, sft has" in done.stdout


def test_trainer_trains_with_its_own_loss(bench: Workspace, built: dict[str, dict]) -> None:
    facts = built["smooth"]["facts"]
    assert (facts["steps"], facts["smoothing"]) == (2, 0.5)
    # Half of the target is the uniform distribution, whose cross-entropy is at least log(vocabulary size).
    uniform = math.log(weights(built["base"]["path"])["model.embed_tokens.weight"].shape[0])
    assert facts["loss"] > 0.5 * facts["eval_loss"] + 0.5 * uniform
    assert facts["eval_loss"] == pytest.approx(loss_of(built, "smooth"), rel=1e-5)
    assert facts["eval_loss"] < loss_of(built, "base")
    assert_reloaded(built["smooth"]["path"])


def test_metric_and_summary_line_of_its_trainer_are_shown(bench: Workspace, built: dict[str, dict]) -> None:
    logged = [event for event in events_of(bench.store / "run") if event["event"] == "metrics"]
    of_trainer = [event["values"] for event in logged if event["stage"] == "smooth"]
    assert any("mean_token_accuracy" in values for values in of_trainer)
    code = (
        "import json, sys\n"
        "from tunery.events.run_state import StageState\n"
        "from tunery.events.stage_summary import note\n"
        "print(note(StageState('smooth', 'smoothed_sft', status='done', facts=json.loads(sys.argv[1]))))"
    )
    facts = built["smooth"]["facts"]
    command = [sys.executable, "-c", code, json.dumps(facts)]
    done = subprocess.run(command, env={**os.environ, **PLUGIN}, capture_output=True, text=True, check=False)
    assert done.stdout == f"smoothed loss {facts['loss']:.2f}, eval loss {facts['eval_loss']:.2f}\n", done.stderr


def test_filter_uses_its_scorer_on_ray_workers(bench: Workspace) -> None:
    rows = bench.folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("aeiou", "tsk tsk", "banana", "rhythm")))
    done = bench.tunery("filter", str(rows), "--out", "good.jsonl", "--by", "vowels", **PLUGIN)
    assert done.returncode == 0, done.stderr
    good = [json.loads(line)["text"] for line in (bench.folder / "good.jsonl").read_text().splitlines()]
    assert good == ["aeiou", "banana"]


def events_of(run: Path) -> list[dict]:
    return [json.loads(line) for path in (run / "events").glob("*.jsonl") for line in path.read_text().splitlines()]


def loss_of(built: dict[str, dict], model: str) -> float:
    return next(result["loss"] for result in built["eval"]["facts"]["results"] if result["model"] == model)


def weights(path: str) -> dict[str, torch.Tensor]:
    return dict(load_model({"artifact": path}, torch.float32).state_dict())


def assert_reloaded(path: str) -> None:
    runtime_stats = json.loads((Path(path) / "runtime_stats.json").read_text())
    assert runtime_stats["reload_check"].startswith("passed")

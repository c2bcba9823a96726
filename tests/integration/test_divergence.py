"""Every trainer, and a search: a training that diverges fails with an error that names the step, and saves no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from one_process import build_stages
from run_here import RunsHere
from small_classifiers import write_language_model
from workspace import Workspace

WILD: dict[str, Any] = {
    "learning_rate": 1.0e38,
    "max_grad_norm": 1.0e9,
    "schedule": "constant",
    "warmup": 0,
    "epochs": 3,
    "model": {"pretrained": "./base"},
}
SHORT = {"max_length": 128, "sampling": {"max_new_tokens": 8}, "reward": {"python": "reward.py"}}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"data": "texts", "global_batch_size": 4, "max_length": 64},
    "sft": {"data": "questions", "global_batch_size": 4},
    "sft_lora": {"kind": "sft", "data": "questions", "global_batch_size": 4, "tuner": {"lora": {"rank": 2}}},
    "classifier": {"data": {"good": "questions", "bad": "texts"}, "global_batch_size": 4},
    "reward": {"data": "pairs", "global_batch_size": 4},
    "reward_lora": {"kind": "reward", "data": "pairs", "global_batch_size": 4, "tuner": {"lora": {"rank": 2}}},
    "dpo": {"data": "pairs", "global_batch_size": 4},
    "kto": {"data": "pairs", "global_batch_size": 4},
    "grpo": {"data": "prompts", "global_batch_size": 8, "group_size": 4, **SHORT},
    "rloo": {"data": "prompts", "global_batch_size": 8, "group_size": 4, **SHORT},
    "ppo": {"data": "prompts", "global_batch_size": 8, "minibatches": 2, **SHORT},
    "ppo_lora": {
        "kind": "ppo",
        "data": "prompts",
        "global_batch_size": 8,
        "minibatches": 2,
        "tuner": {"lora": {"rank": 2}},
        **SHORT,
    },
}
SOURCES = {"texts": "texts", "questions": "questions", "pairs": "corrupted", "prompts": "prompts"}


def write_experiment(folder: Path, compute: dict[str, Any], **changed: Any) -> Path:
    write_language_model(folder / "base")
    (folder / "reward.py").write_text(
        "def reward(prompts, responses):\n    return [float(len(a) % 7) for a in responses]\n"
    )
    stages: dict[str, Any] = {
        name: {"kind": "dataset", "source": "builtin:python-docs", "subset": subset, "split": "train", "limit": 24}
        for name, subset in SOURCES.items()
    }
    stages |= {name: {"kind": name, **WILD, **fields, **changed} for name, fields in STAGES.items()}
    file = folder / "wild.yaml"
    file.write_text(yaml.safe_dump({"name": "wild", "seed": 3, "stages": stages, "compute": compute}, sort_keys=False))
    return file


def models_in(store: Path) -> list[str]:
    return sorted(path.name for path in store.glob("artifacts/*") if not path.name.startswith("dataset-"))


def test_every_trainer_stops_with_an_error_when_it_diverges(tmp_path: Path) -> None:
    file = write_experiment(tmp_path, {"workers": 1, "zero_stage": 2, "save_steps": 1})
    output = build_stages(file, tmp_path / "store", *STAGES)
    for name, result in output.items():
        assert "diverged at step" in result.get("error", ""), (name, result)
        assert "lower `learning_rate`" in result["error"], name
        assert "learning rate 1e+38" in result["error"], name
    assert models_in(tmp_path / "store") == []


def test_every_trainer_saves_what_it_trained(tmp_path: Path) -> None:
    sane = {"learning_rate": 1.0e-3, "max_grad_norm": 1.0, "epochs": 0.5}
    file = write_experiment(tmp_path, {"workers": 1, "zero_stage": 2}, **sane)
    output = build_stages(file, tmp_path / "store", *STAGES)
    for name, result in output.items():
        assert result.get("runtime_stats", {}).get("reload_check", "").startswith("passed: "), (name, result)
        assert result["facts"]["skipped_steps"] == 0


def test_bf16_rounding_passes_the_reload_check(tmp_path: Path) -> None:
    sane = {"learning_rate": 1.0e-3, "max_grad_norm": 1.0, "epochs": 0.5}
    file = write_experiment(tmp_path, {"workers": 1, "precision": "bf16"}, **sane)
    output = build_stages(file, tmp_path / "store", "sft", "sft_lora", "reward", "reward_lora", "ppo_lora")
    for name, result in output.items():
        assert result.get("runtime_stats", {}).get("reload_check", "").startswith("passed: "), (name, result)
        assert result["runtime_stats"]["dtype"] == "bf16"


def test_diverged_training_stops_without_zero(tmp_path: Path) -> None:
    # DeepSpeed then computes no gradient norm and skips no steps.
    file = write_experiment(tmp_path, {"workers": 1, "zero_stage": 0})
    output = build_stages(file, tmp_path / "store", "sft", "dpo")
    assert all("diverged at step" in result.get("error", "") for result in output.values()), output
    assert models_in(tmp_path / "store") == []


def test_workers_stop_together_and_a_search_continues_without_the_diverged_trial(
    before_sft: Workspace, runs_here: RunsHere
) -> None:
    def change(experiment: dict[str, Any]) -> None:
        sft = experiment["stages"]["sft"]
        sft |= {"max_grad_norm": 1.0e9, "schedule": "constant", "warmup": 0, "tuner": {"lora": {"rank": 2}}}
        experiment["stages"].pop("eval")
        experiment["search"] = {
            "metric": "sft.eval_loss",
            "mode": "min",
            "trials": 2,
            "algorithm": "grid",
            "scheduler": "none",
            "space": {"sft.learning_rate": {"choice": [1.0e-3, 1.0e38]}},
        }
        experiment["compute"] = {"workers": 2, "zero_stage": 3}

    before_sft.write(change)
    done = runs_here.tunery(before_sft, "run", str(before_sft.file))
    assert done.returncode == 0, done.stdout + done.stderr
    ended = [event for event in before_sft.events() if event["event"] == "trial_finished"]
    states = {event["overrides"]["sft.learning_rate"]: (event["state"], event["error"]) for event in ended}
    assert states[1.0e-3] == ("done", "")
    assert states[1.0e38][0] == "failed"
    assert "diverged at step" in states[1.0e38][1]
    assert "diverged" in done.stdout

    def alone(experiment: dict[str, Any]) -> None:
        change(experiment)
        experiment.pop("search")
        experiment["stages"]["sft"]["learning_rate"] = 1.0e38

    before_sft.write(alone)
    models = before_sft.artifacts("sft")
    done = runs_here.tunery(before_sft, "run", str(before_sft.file))
    assert done.returncode == 1, done.stdout
    assert "sft: the training diverged at step" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert before_sft.artifacts("sft") == models

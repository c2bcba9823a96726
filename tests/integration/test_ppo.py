"""PPO runs give the same result with any number of workers, and after they are killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from processes import contents, worker_pids
from run_here import RunsHere
from transformers import AutoModelForCausalLM
from workspace import Workspace, facts, wait_for

from tunery.models.load import load_model

LORA = {"lora": {"rank": 4}}
PPO = {
    "kind": "ppo",
    "data": "prompts",
    "model": "base",
    "reward": "rm",
    "epochs": 1,
    "learning_rate": 0.001,
    "global_batch_size": 16,
    "max_length": 100,
    "minibatches": 2,
    "ppo_epochs": 2,
    "sampling": {"max_new_tokens": 20},
    "eval_data": "held",
    "num_evals": 2,
}


def with_ppo(bench: Workspace, **compute: object) -> None:
    """Write an experiment with a LoRA reward model, LoRA PPO on the same base with all optional terms, and full PPO."""

    def change(experiment: dict) -> None:
        stages = experiment["stages"]
        for name in ("validation", "scored", "clean", "sft", "eval"):
            stages.pop(name)
        rows = {"kind": "dataset", "source": "builtin:python-docs", "split": "train"}
        stages |= {
            "pairs": {**rows, "subset": "preferences", "limit": 32},
            "prompts": {**rows, "subset": "prompts", "limit": 32},
            "held": {**rows, "subset": "prompts", "split": "validation", "limit": 9},
            "rm": {
                "kind": "reward",
                "data": "pairs",
                "model": "base",
                "tuner": LORA,
                "epochs": 1,
                "learning_rate": 0.001,
                "global_batch_size": 8,
            },
            "lora": {
                **PPO,
                "tuner": LORA,
                "kl": {"target": 0.05, "horizon": 100.0, "estimator": "k3"},
                "ptx": {"data": "questions", "coefficient": 0.5},
                "entropy_coefficient": 0.01,
                "whiten_rewards": True,
                "missing_eos_penalty": 0.5,
            },
            "whole": PPO,
        }
        experiment["compute"] = {**experiment["compute"], "save_steps": 1, **compute}

    bench.write(change)


@pytest.fixture(scope="module")
def store(complete_run: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the datasets and the base model of the small experiment."""
    folder = tmp_path_factory.mktemp("before-ppo") / "store"
    for artifact in (complete_run.store / "artifacts").iterdir():
        if artifact.name.startswith(("dataset-", "pretrain-")):
            shutil.copytree(artifact, folder / "artifacts" / artifact.name)
    return folder


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Facts and paths of all stages, built with one worker. All artifacts except those of PPO are added to `store`."""
    bench = Workspace(tmp_path_factory.mktemp("alone"))
    with_ppo(bench, workers=1, zero_stage=0)
    shutil.copytree(store, bench.store)
    result = bench.without_ray(bench.store)
    for artifact in (bench.store / "artifacts").iterdir():
        if not artifact.name.startswith("ppo-"):
            shutil.copytree(artifact, store / "artifacts" / artifact.name, dirs_exist_ok=True)
    return result


@pytest.fixture(scope="module")
def sharded(
    alone: dict[str, dict], store: Path, tmp_path_factory: pytest.TempPathFactory, runs_here: RunsHere
) -> Workspace:
    """The same experiment run with two workers and sharded weights (ZeRO-3)."""
    bench = Workspace(tmp_path_factory.mktemp("sharded"))
    shutil.copytree(store, bench.store)
    with_ppo(bench, workers=2, zero_stage=3, micro_batch_size=2)
    runs_here.execute(bench)
    return bench


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_one_worker_with_16_responses_and_two_with_8_learn_the_same(
    alone: dict[str, dict], sharded: Workspace, name: str
) -> None:
    (end,) = (e for e in sharded.events() if e["event"] == "stage_finished" and e["stage"] == name)
    result = end["facts"]
    one, two = (
        [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
        for path in (Path(alone[name]["path"]), Path(end["artifact"]))
    )
    assert len(one) == len(two) == 2 + 3
    for first, second in zip(one, two, strict=True):
        for key, value in first.items():  # DeepSpeed logs the gradient norm only under ZeRO
            # Absolute tolerance: sampler_logprob_diff is rounding error, and the mean of whitened advantages is near 0.
            assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (first["step"], key)
    for first, second in zip(alone[name]["facts"]["responses"], result["responses"], strict=True):
        for key, value in first.items():
            assert second[key] == (pytest.approx(value, rel=1e-3, abs=1e-3) if "reward" in key else value), key
    assert result["shared_base"] == (name == "lora")
    assert result["value_init"] == "reward"


def test_four_models_on_one_base_need_less_memory_than_four_models(alone: dict[str, dict]) -> None:
    measured = {
        name: json.loads((Path(alone[name]["path"]) / "runtime_stats.json").read_text()) for name in ("lora", "whole")
    }
    lora, whole = measured["lora"], measured["whole"]
    assert lora["weights_bytes_separate"] == pytest.approx(whole["weights_bytes"], rel=0.01)
    assert lora["weights_bytes"] < 0.5 * whole["weights_bytes"]


def test_trained_policy_loads_like_any_model(alone: dict[str, dict]) -> None:
    import torch

    whole = Path(alone["whole"]["path"])
    plain = AutoModelForCausalLM.from_pretrained(whole / "model")
    base = load_model({"artifact": alone["base"]["path"]}, torch.float32)
    tuned = load_model({"artifact": alone["lora"]["path"]}, torch.float32)
    weights = [dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"] for model in (plain, base, tuned)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[1])
    assert (weights[2] - weights[1]).norm() < 0.2 * weights[1].norm()


def test_killed_ppo_resumes_and_ends_with_the_same_bytes(sharded: Workspace, store: Path, tmp_path: Path) -> None:
    bench = Workspace(tmp_path)
    shutil.copytree(store, bench.store)
    with_ppo(bench, workers=2, zero_stage=3, micro_batch_size=2)
    first = bench.start()
    wait_for(lambda: list(bench.store.glob("work/ppo-*/checkpoints/checkpoint-*/whole")), 240, process=first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_for(lambda: not worker_pids(bench), seconds=60)
    assert not bench.artifacts("ppo")
    second = bench.tunery("run", str(bench.file), WANDB_MODE="disabled")
    assert second.returncode == 0, second.stdout + second.stderr
    measured = [json.loads((path / "runtime_stats.json").read_text()) for path in bench.artifacts("ppo")]
    assert max(item["resumed_from"] for item in measured) == 1, "it began again from nothing"
    for one, other in zip(bench.artifacts("ppo"), sharded.artifacts("ppo"), strict=True):
        assert contents(one) == contents(other)
        assert facts(one) == facts(other)

"""A reward model that is trained and scores rows in the same run: results do not depend on workers, and it can be
loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_here import RunsHere
from small_classifiers import WORDS, write_language_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workspace import Workspace, facts

from tunery.models.load import load_classifier
from tunery.store.rows import read_rows


def reward_models(bench: Workspace, **compute: object) -> None:
    """Write an experiment with a full reward model, evaluated on held-out pairs, and a LoRA one. `compute`: changed
    compute settings."""

    def change(experiment: dict) -> None:
        stages = experiment["stages"]
        for name in ("scored", "clean", "sft", "eval"):
            stages.pop(name)
        pairs = {**stages["validation"], "subset": "preferences"}
        rm = {
            "kind": "reward",
            "data": "pairs",
            "eval_data": "heldout",
            "model": "base",
            "epochs": 1,
            "learning_rate": 0.001,
            "global_batch_size": 8,
            "num_evals": 2,
            "center": 0.01,
        }
        lora = {**rm, "eval_data": None, "tuner": {"lora": {"rank": 4}}, "epochs": 0.5}
        stages |= {
            "pairs": {**pairs, "split": "train", "limit": 80},
            "heldout": {**pairs, "limit": 21},
            "rm": rm,
            "lora": lora,
        }
        if compute["workers"] == 2:
            by = [{"reward": "rm"}, {"reward": "lora", "name": "by_lora"}]
            stages["scored"] = {"kind": "score", "data": "heldout", "by": by}
        experiment["compute"] = {**experiment["compute"], **compute}

    bench.write(change)


def test_reward_model_does_not_depend_on_workers_and_scores_are_normalized(
    before_sft: Workspace, runs_here: RunsHere
) -> None:
    bench = before_sft
    reward_models(bench, workers=1, zero_stage=0)
    shutil.copytree(bench.store, bench.folder / "alone")
    alone = bench.without_ray(bench.folder / "alone")
    reward_models(bench, workers=2, zero_stage=3, micro_batch_size=1)
    runs_here.execute(bench)
    trained = {"adapter" if (path / "adapter").is_dir() else "model": path for path in bench.artifacts("reward")}
    whole, adapter = facts(trained["model"]), facts(trained["adapter"])
    for name, entry in (("rm", whole), ("lora", adapter)):
        there = alone[name]["facts"]
        for fact in (
            "loss",
            "reward_mean",
            "reward_std",
            *(("eval_loss", "eval_margin") if name == "rm" else ()),
        ):
            assert entry[fact] == pytest.approx(there[fact], rel=1e-4), (name, fact)
        same = (
            "pairs",
            "eval_pairs",
            "tokens",
            "steps",
            "parameters",
            "trainable",
            "truncated",
            "reward_norm_responses",
        )
        assert {fact: entry[fact] for fact in same} == {fact: there[fact] for fact in same}
    assert whole["eval_accuracy"] == alone["rm"]["facts"]["eval_accuracy"]
    assert (whole["pairs"], whole["eval_pairs"], whole["steps"], whole["scale_from"]) == (80, 21, 10, "eval_data")
    assert (adapter["reward_norm_responses"], adapter["scale_from"], adapter["steps"]) == (160, "data", 5)
    assert adapter["trainable"] < whole["trainable"] / 4

    model = AutoModelForSequenceClassification.from_pretrained(trained["model"] / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained["model"] / "model")
    (heldout,) = (
        path
        for path in bench.artifacts("dataset")
        if facts(path)["rows"] == 21 and next(read_rows(path))["rejected"] is not None
    )
    sides: list[list[float]] = []
    for row in read_rows(heldout, ["messages", "rejected"]):
        rewards = []
        for response in (row["messages"][-1:], row["rejected"]):
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in [*row["messages"][:-1], *response]]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            with torch.no_grad():
                inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
                rewards.append(float(model(input_ids=inputs["input_ids"]).logits[0, 0]))
        sides.append(rewards)
    rewards_p2 = np.array(sides)
    mean, deviation = whole["reward_mean"], whole["reward_std"]
    assert mean == pytest.approx(rewards_p2.mean(), abs=1e-5)
    assert deviation == pytest.approx(rewards_p2.std(), rel=1e-3)
    margins = rewards_p2[:, 0] - rewards_p2[:, 1]
    assert whole["eval_loss"] == pytest.approx(float(np.log1p(np.exp(-margins)).mean()), abs=1e-5)
    (scores,) = (entry for path in bench.artifacts("score") if "reward" in (entry := facts(path)["scores"]))
    expected = float(np.median((rewards_p2[:, 0] - mean) / deviation))
    assert scores["reward"]["median"] == pytest.approx(expected, abs=1e-3)
    assert scores["by_lora"]["unscored"] == 0


def test_adapter_and_new_head_train_in_bf16_under_zero_3(before_sft: Workspace, runs_here: RunsHere) -> None:
    reward_models(before_sft, workers=2, zero_stage=3, precision="bf16")
    trained = runs_here.execute(before_sft)["lora"]
    assert (trained.path / "adapter").is_dir()
    assert trained.runtime_stats["dtype"] == "bf16"
    merged, _ = load_classifier({"artifact": str(trained.path)}, torch.float32)
    assert all(weight.requires_grad for weight in merged.parameters()), "PPO's value model may start from it"


def test_training_and_evaluation_read_the_same_output_position(tmp_path: Path) -> None:
    """Rows of many lengths in one step with a learning rate near 0: training and evaluation loss are equal."""
    model = write_language_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": 7}))  # that of the tokenizer is 0
    pairs = [{"prompt": WORDS[n], "chosen": " ".join(WORDS[:n]), "rejected": WORDS[-n]} for n in range(2, 14)]
    rated = [{"prompt": WORDS[n], "completion": " ".join(WORDS[:n]), "label": n % 2 == 0} for n in range(2, 14)]
    for name, rows in (("pairs", pairs), ("rated", rated)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    still = {"model": {"pretrained": "./model"}, "epochs": 1, "learning_rate": 1e-20, "global_batch_size": 12}
    stages = {
        "pairs": {"kind": "dataset", "source": "pairs.jsonl"},
        "rated": {"kind": "dataset", "source": "rated.jsonl"},
        "rm": {"kind": "reward", "data": "pairs", "eval_data": "pairs", **still},
        "judge": {"kind": "classifier", "data": "rated", "eval_data": "rated", **still},
    }
    compute = {"workers": 1, "zero_stage": 0, "micro_batch_size": 4}
    bench = Workspace(tmp_path)
    bench.file.write_text(yaml.safe_dump({"name": "still", "seed": 17, "stages": stages, "compute": compute}))
    built = bench.without_ray(bench.store)
    for name in ("rm", "judge"):
        result = built[name]["facts"]
        assert result["steps"] == 1
        assert result["loss"] == pytest.approx(result["eval_loss"], rel=1e-5), name

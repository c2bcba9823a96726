"""A classifier that is trained and scores rows in the same run: workers do not change it, transformers can load it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from run_here import RunsHere
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workspace import Workspace, facts

from tunery.store.rows import read_rows


def classifier_on_two_stages(bench: Workspace, **compute: object) -> None:
    """Write an experiment that trains a classifier on intact against corrupted rows. `compute`: changed compute
    settings."""

    def change(experiment: dict) -> None:
        stages = experiment["stages"]
        for name in ("scored", "clean", "sft", "eval"):
            stages.pop(name)
        rows = {**stages["validation"], "limit": 20}
        stages |= {
            "damaged": {**stages["questions"], "corrupt_fraction": 1.0},
            "intact": {**stages["questions"], "corrupt_fraction": 0.0},
            "rows": {**rows, "corrupt_fraction": 0.5},
            "damaged_eval": {**rows, "corrupt_fraction": 1.0},
            "intact_eval": rows,
            "judge": {
                "kind": "classifier",
                "data": {"good": "intact", "bad": "damaged"},
                "eval_data": {"good": "intact_eval", "bad": "damaged_eval"},
                "model": "base",
                "epochs": 0.5,
                "learning_rate": 0.001,
                "global_batch_size": 8,
                "num_evals": 2,
            },
        }
        if compute["workers"] == 2:
            scorer = {"classifier": "judge", "label": "good"}
            fitted = {**scorer, "temperature": "auto", "name": "fitted"}
            stages["scored"] = {"kind": "score", "data": "rows", "by": [scorer, fitted]}
        experiment["compute"] = {**experiment["compute"], **compute}

    bench.write(change)


def test_classifier_does_not_depend_on_workers_and_loads_in_transformers(
    before_sft: Workspace, runs_here: RunsHere
) -> None:
    bench = before_sft
    classifier_on_two_stages(bench, workers=1, zero_stage=0)
    shutil.copytree(bench.store, bench.folder / "alone")
    alone = bench.without_ray(bench.folder / "alone")["judge"]["facts"]
    classifier_on_two_stages(bench, workers=2, zero_stage=3, micro_batch_size=1)
    runs_here.execute(bench)
    trained = bench.only("classifier")
    result = facts(trained)
    for name in ("loss", "eval_loss", "eval_auc", "temperature"):
        assert result[name] == pytest.approx(alone[name], rel=1e-4), name
    same = ("rows", "labels", "eval_labels", "tokens", "steps", "parameters", "trainable", "eval_accuracy")
    assert {name: result[name] for name in same} == {name: alone[name] for name in same}
    assert result["labels"] == {"bad": 120, "good": 120}
    assert result["steps"] == 15

    model = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    (rated,) = (path for path in bench.artifacts("score") if "classifier" in facts(path)["scores"])
    texts = []
    for row in read_rows(rated, ["messages"]):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    good = model.config.label2id["good"]
    for score, temperature in (("classifier", 1.0), ("fitted", result["temperature"])):
        probabilities = (logits / temperature).softmax(dim=1)[:, good].numpy()
        assert facts(rated)["scores"][score]["median"] == pytest.approx(float(np.median(probabilities)), abs=1e-5)

"""Do the model scorers give on a GPU what they give on a CPU, in fp32 and in bf16? Needs a GPU.

    python benchmarks/gpu_scores_match_cpu.py [--rows 1000]

Trains a small language model and a classifier on it, writes a reward model with random weights, and scores the same
rows with perplexity, IFD, classifier, reward and embedding: on the CPU, on a GPU in fp32, on a GPU in bf16, each in a
store of its own. Prints for each score and arm the largest and the median difference from the CPU relative to the
score's spread (its standard deviation), the rank correlation, and each arm's rows a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

ARMS = {
    "cpu fp32": {"device": "cpu"},
    "gpu fp32": {"device": "gpu", "workers": 1, "precision": "fp32"},
    "gpu bf16": {"device": "gpu", "workers": 1},
}
LIMIT = 150
"""Seconds that one arm may take."""
CORPUS = {"kind": "dataset", "source": "builtin:python-docs"}


def run(name: str, stages: dict[str, Any], compute: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The stage_finished events, by stage."""
    file, store = folder / f"{name}.yaml", folder / name
    experiment = {
        "name": "run",
        "seed": 17,
        "stages": stages,
        "compute": compute,
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    command = [sys.executable, "-m", "tunery", "run", str(file), "--store", str(store)]
    log = store / "runs/run/events/driver.jsonl"
    try:
        subprocess.run(command, check=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name}: not done in {LIMIT} s; last: {log.read_text().splitlines()[-1]}") from None
    events = map(json.loads, log.read_text().splitlines())
    return {event["stage"]: event for event in events if event["event"] == "stage_finished"}


def write_reward_model(base: Path, folder: Path) -> None:
    """The base with a head of random weights."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder: Path) -> dict[str, Path]:
    """Model folders by name."""
    stages = {
        "texts": {**CORPUS, "subset": "texts", "split": "train", "limit": 1500},
        "good": {**CORPUS, "subset": "questions", "split": "train", "limit": 600},
        "bad": {**CORPUS, "subset": "questions", "split": "train", "limit": 600, "corrupt_fraction": 1.0},
        "base": {
            "kind": "pretrain",
            "data": "texts",
            "model": {"scratch": "tiny"},
            "epochs": 1,
            "learning_rate": 2.0e-3,
            "global_batch_size": 4,
            "max_length": 256,
        },
        "judge": {
            "kind": "classifier",
            "data": {"good": "good", "bad": "bad"},
            "model": "base",
            "epochs": 1,
            "learning_rate": 1.0e-3,
            "global_batch_size": 8,
        },
    }
    done = run("train", stages, {"device": "gpu", "workers": 1}, folder)
    models = {name: Path(done[name]["artifact"]) / "model" for name in ("base", "judge")}
    write_reward_model(models["base"], folder / "reward")
    return {**models, "reward": folder / "reward"}


def scores(arm: str, models: dict[str, Path], rows: int, folder: Path) -> tuple[dict[str, np.ndarray], float]:
    model = {name: {"pretrained": str(path)} for name, path in models.items()}
    by = [
        {"perplexity": model["base"]},
        {"ifd": model["base"]},
        {"classifier": model["judge"], "label": "good"},
        {"reward": model["reward"]},
        {"embedding": model["base"], "reference": "near"},
    ]
    stages = {
        "rows": {**CORPUS, "subset": "questions", "split": "all", "limit": rows},
        "near": {**CORPUS, "subset": "questions", "split": "test"},
        "scored": {"kind": "score", "data": "rows", "by": by},
    }
    done = run(arm.replace(" ", "-"), stages, ARMS[arm], folder)["scored"]
    files = sorted((Path(done["artifact"]) / "scores").glob("*.parquet"))
    table = {key: [] for key in ("perplexity", "ifd", "classifier", "reward", "embedding")}
    for file in files:
        for key, values in table.items():
            values.append(pq.read_table(file, columns=[key])[0].to_numpy())
    return {key: np.concatenate(values) for key, values in table.items()}, rows / done["seconds"]


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = train(folder)
        found = {arm: scores(arm, models, arguments.rows, folder) for arm in ARMS}
    reference = found["cpu fp32"][0]
    print(f"{'arm':9} {'score':11} {'largest':>9} {'median':>9} {'rank correlation':>17}   of the score's spread")
    for arm, (table, speed) in found.items():
        for score, values in table.items() if arm != "cpu fp32" else ():
            assert (np.isnan(values) == np.isnan(reference[score])).all()
            there = ~np.isnan(values)
            apart = np.abs(values - reference[score])[there] / reference[score][there].std()
            alike = np.corrcoef(ranks(values[there]), ranks(reference[score][there]))[0, 1]
            print(f"{arm:9} {score:11} {apart.max():9.1e} {np.median(apart):9.1e} {alike:17.6f}")
        print(f"{arm:9} {speed:,.0f} rows a second, Ray's start included")


if __name__ == "__main__":
    main()

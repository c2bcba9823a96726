"""What does a search take, beside what a user would write with Ray Tune and TRL? Wall time and optimizer steps until
the winner is known. The same trials, the same rule (lowest loss on the same held-out rows).

    python benchmarks/search_beside_plain.py [--trials 12] [--store FOLDER]
    python benchmarks/search_beside_plain.py --gpu 0.6b --trials 8 [--arms plain,alone]    # one GPU, a few arms a time

plain            Ray Tune, one trial at a time on all cores: each loads the model, scores the rows, filters them, trains
                 LoRA by TRL's SFTTrainer and evaluates
ours, alone      tunery with `max_packed_trials: 1`: rows are scored once, trials side by side, one on each core
ours, packed     the same in packs
ours, with ASHA  in packs, the worse ones stopped early

Datasets and base are there before (made once into --store); scoring is in every arm. Each arm is a process of its own,
whose wall time counts from its start, with Ray's and imports, until the winner is named. (Then tunery trains with the
file's own values too, where no trial had them, for the comparison: nothing that the plain arm does.) With --gpu the
base is a model of that shape (benchmarks/packed_lora.py) with random weights, in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARMS: dict[str, dict[str, Any]] = {
    "alone": {"compute": {"max_packed_trials": 1}},
    "packed": {},
    "asha": {"search": {"scheduler": "asha"}},
}
"""Ours."""
ROWS_ON_GPU = 320


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--store", type=Path, default=Path("/tmp/search_beside_plain"))
    parser.add_argument("--gpu", default="", help="a shape of benchmarks/packed_lora.py")
    parser.add_argument("--arms", default=",".join(("plain", *ARMS)), help="others are printed as they came out before")
    options = parser.parse_args()
    options.store.mkdir(parents=True, exist_ok=True)
    made = _prepare(options.store, options.trials, options.gpu)
    for arm in options.arms.split(","):
        if arm == "plain":
            result = _plain(made, options.store)
        else:
            result = _ours(arm, options.store, made)
        (options.store / f"{arm}.json").write_text(json.dumps(result))
    told = {arm: options.store / f"{arm}.json" for arm in ("plain", *ARMS)}
    results = {arm: json.loads(path.read_text()) for arm, path in told.items() if path.exists()}
    _print(results, options.trials, options.gpu)


def _print(results: dict[str, dict[str, Any]], trials: int, gpu: str) -> None:
    print(f"{trials} trials on {f'one GPU, {gpu}' if gpu else f'{len(os.sched_getaffinity(0))} cores'}")
    plain = results.get("plain")
    print("arm                seconds   times plain    steps   winner's loss   its rank among plain's")
    for arm, told in results.items():
        line = f"{arm:16} {told['seconds']:9.0f} "
        line += f"{plain['seconds'] / told['seconds']:13.2f} " if plain else f"{'':13} "
        line += f"{told['steps']:8,} {told['losses'][told['winner']]:15.4f} "
        if plain:
            line += f"{sorted(plain['losses'].values()).index(plain['losses'][told['winner']]) + 1:23}"
        print(line)


def _experiment(trials: int, changes: dict[str, Any], own: dict[str, Any], model: str) -> dict[str, Any]:
    """`own`: the file's own values, by path. `model`: a folder with the base, on a GPU; "" for the file's own base."""
    from tunery.spec.yaml_source import read_yaml

    told: dict[str, Any] = read_yaml((ROOT / "experiments/sweep.yaml").read_text(), "sweep.yaml").data
    stages = told["stages"]
    for name in ("eval", "heldout"):
        stages.pop(name)
    told["search"] |= {"trials": trials, "scheduler": "none", "num_seeds": 1, **changes.get("search", {})}
    told["compute"] = changes.get("compute", {})
    if model:
        for name in ("texts", "base"):
            stages.pop(name)
        base = {"pretrained": model}
        stages["questions"]["limit"], stages["validation"]["limit"] = ROWS_ON_GPU, ROWS_ON_GPU // 4
        stages["scored"]["by"] = [{"perplexity": base}]
        stages["sft"] |= {"model": base, "learning_rate": 1e-4}
        told["search"]["space"]["sft.learning_rate"] = {"loguniform": [1e-5, 1e-3]}
        told["compute"] |= {"device": "gpu", "precision": "bf16"}
    for path, value in own.items():
        *parents, last = path.split(".")
        place = stages
        for key in parents:
            place = place[key]
        place[last] = value
    told["tracking"] = {"wandb": {"mode": "disabled"}}
    return told


def _write(path: Path, experiment: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(experiment))  # JSON is YAML
    return path


def _tunery(file: Path, store: Path) -> None:
    path = os.pathsep.join((str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "tunery", "run", str(file), "--store", str(store), "--json"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)


def _prepare(store: Path, trials: int, gpu: str) -> dict[str, Any]:
    """Datasets and base, once; returns where they lie, and the trials."""
    from tunery.search.space import random_point
    from tunery.spec import load

    model = str(store / "random/model") if gpu else ""
    if gpu and not (store / "random/model").is_dir():
        import packed_lora

        asked = {"folder": str(store / "random"), "shape": gpu, "device": "gpu", "batch": 1, "steps": 1}
        packed_lora._process("make", asked)  # in a process of its own: it would keep the GPU's memory
    experiment = _experiment(trials, {}, {}, model)
    del experiment["search"]
    shared = ("texts", "questions", "validation", "base")
    experiment["stages"] = {name: stage for name, stage in experiment["stages"].items() if name in shared}
    _tunery(_write(store / "base.yaml", experiment), store / "base")
    told, _ = load(_write(store / "all.yaml", _experiment(trials, {}, {}, model)))
    assert told.search is not None
    points = [random_point(told.search.space, told.seed, number, {}) for number in range(trials)]
    found: dict[str, Any] = {"points": points, "seed": told.seed, "model": model}
    for event in (
        json.loads(line) for line in (store / "base/runs/sweep/events/driver.jsonl").read_text().splitlines()
    ):
        if event["event"] == "stage_finished":
            found[event["stage"]] = event["artifact"]
    return found


def _ours(arm: str, store: Path, made: dict[str, Any]) -> dict[str, Any]:
    own, points = store / arm, made["points"]
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(store / "base/artifacts", own / "artifacts")
    experiment = _experiment(len(points), ARMS[arm], points[0], made["model"])
    begin = time.time()
    _tunery(_write(own / "sweep.yaml", experiment), own)
    events = map(json.loads, (own / "runs/sweep/events/driver.jsonl").read_text().splitlines())
    seconds = next(event["t"] for event in events if event["event"] == "search_finished") - begin
    (search,) = (own / "artifacts").glob("search-*")
    facts = json.loads((search / "manifest.json").read_text())["facts"]
    assert len(list((own / "artifacts").glob("score-*"))) == 1, "rows were scored once"
    losses = {_name(trial["overrides"]): trial["value"] for trial in facts["trials"]}
    steps = sum(int(trial["steps"] or 0) for trial in facts["trials"])
    winner = _name(facts["best"]["overrides"])
    return {"seconds": seconds, "steps": steps, "losses": losses, "winner": winner}


def _name(overrides: dict[str, Any]) -> str:
    return json.dumps(overrides, sort_keys=True)


def _plain(made: dict[str, Any], store: Path) -> dict[str, Any]:
    begin = time.time()
    told = {**made, "out": str(store / "plain")}
    shutil.rmtree(told["out"], ignore_errors=True)
    done = subprocess.run(
        [sys.executable, __file__, "plain", json.dumps(told)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    trials = json.loads(done.stdout.strip().splitlines()[-1])
    losses = {_name(trial["config"]): trial["loss"] for trial in trials}
    winner = min(losses, key=lambda name: losses[name])
    steps = sum(trial["steps"] for trial in trials)
    return {"seconds": time.time() - begin, "steps": steps, "losses": losses, "winner": winner}


# What a user would write.


def plain(told: dict[str, Any]) -> None:
    import ray
    from ray import tune

    cores, gpus = len(os.sched_getaffinity(0)), int(bool(told["model"]))
    ray.init(
        address="local",
        num_cpus=cores,
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300_000_000,
    )
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, told=told), {"cpu": cores, "gpu": gpus}),
        param_space={"point": tune.grid_search(told["points"])},
        tune_config=tune.TuneConfig(metric="loss", mode="min", max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=told["out"], name="plain", verbose=0),
    )
    results = tuner.fit()
    trials = [
        {"config": result.config["point"], "loss": result.metrics["loss"], "steps": result.metrics["steps"]}
        for result in results
    ]
    print(json.dumps(trials))


def _trial(config: dict[str, Any], told: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    point = config["point"]
    gpu = bool(told["model"])
    folder = Path(told["model"] or Path(told["base"]) / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if gpu else torch.float32)
    model.to("cuda" if gpu else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, heldout = (_encoded(Path(told[name]), tokenizer) for name in ("questions", "validation"))
    scores = _perplexities(model, rows)
    keep = round(point["clean.keep.perplexity.keep_fraction"] * len(rows))
    kept = [rows[index] for index in sorted(range(len(rows)), key=lambda index: scores[index])[:keep]]
    rank = point["sft.tuner.lora.rank"]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=".",
            num_train_epochs=point["sft.epochs"],
            learning_rate=point["sft.learning_rate"],
            per_device_train_batch_size=point["sft.global_batch_size"],
            lr_scheduler_type="cosine",
            warmup_steps=round(0.05 * point["sft.epochs"] * len(kept) / point["sft.global_batch_size"]),
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=gpu,
            gradient_checkpointing=False,
            use_cpu=not gpu,
            seed=told["seed"],
        ),
        train_dataset=Dataset.from_list(kept),
        eval_dataset=Dataset.from_list(heldout),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    tune.report({"loss": trainer.evaluate()["eval_loss"], "steps": trainer.state.global_step})


def _encoded(artifact: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    import pyarrow.parquet as pq

    found = []
    for path in sorted(artifact.rglob("*.parquet")):
        for row in pq.read_table(path, columns=["messages"]).to_pylist():
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
            prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
            asked, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
            found.append({"input_ids": ids[:512], "labels": ([-100] * len(asked) + ids[len(asked) :])[:512]})
    return found


def _perplexities(model: Any, rows: list[dict[str, list[int]]]) -> list[float]:
    """Of the answers, in batches of 8 as they come."""
    import torch

    found: list[float] = []
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in batch])
        ids, mask, labels = ids.to(model.device), mask.to(model.device), labels.to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
        ).view(len(batch), -1)
        found += (losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)).tolist()
    return found


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "plain":
        plain(json.loads(sys.argv[2]))
    else:
        main()

"""What does a search take, beside what a user would write with Ray Tune and TRL? Wall time and optimizer steps until
the winner is known. The same trials, the same rule (lowest loss on the same held-out rows).

    python benchmarks/search_beside_plain.py [--trials 12] [--store FOLDER]

plain            Ray Tune, one trial at a time on all cores: each loads the model, scores the rows, filters them, trains
                 LoRA by TRL's SFTTrainer and evaluates
ours, alone      tunery with `pack: 1`: rows are scored once, trials side by side, one on each core
ours, packed     the same in packs
ours, with ASHA  in packs, the worse ones stopped early

Datasets and base are there before (made once into --store); scoring is in every arm. Each arm is a process of its own,
whose whole wall time counts, with Ray's start and imports. The file's own `sft` has the first trial's values, and is
that trial then.
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
    "ours, alone": {"compute": {"pack": 1}},
    "ours, packed": {},
    "ours, with ASHA": {"search": {"scheduler": "asha"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--store", type=Path, default=Path("/tmp/search_beside_plain"))
    options = parser.parse_args()
    made = _prepare(options.store, options.trials)
    results = {"plain": _plain(made, options.store)}
    for arm, changes in ARMS.items():
        results[arm] = _ours(arm, changes, options.store, made["points"])
    print(f"{options.trials} trials on {len(os.sched_getaffinity(0))} cores")
    print("arm                seconds   times plain    steps   winner's loss   its rank among plain's")
    ranked = sorted(results["plain"]["losses"].values())
    for arm, told in results.items():
        value = results["plain"]["losses"][told["winner"]]
        print(
            f"{arm:16} {told['seconds']:9.0f} {results['plain']['seconds'] / told['seconds']:13.2f} {told['steps']:8,} "
            f"{told['losses'][told['winner']]:15.4f} {ranked.index(value) + 1:23}"
        )


def _experiment(trials: int, changes: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own`: the file's own values, by path."""
    from tunery.spec.yaml_source import read_yaml

    told: dict[str, Any] = read_yaml((ROOT / "experiments/sweep.yaml").read_text(), "sweep.yaml").data
    told["stages"].pop("eval")
    for path, value in own.items():
        *parents, last = path.split(".")
        place = told["stages"]
        for key in parents:
            place = place[key]
        place[last] = value
    told["search"] |= {"trials": trials, "scheduler": "none", "replicate": 1, **changes.get("search", {})}
    told["compute"] = changes.get("compute", {})
    told["tracking"] = {"wandb": {"mode": "disabled"}}
    return told


def _write(path: Path, experiment: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(experiment))  # JSON is YAML
    return path


def _tunery(file: Path, store: Path) -> float:
    begin = time.time()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-m", "tunery", "run", str(file), "--store", str(store), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.time() - begin


def _prepare(store: Path, trials: int) -> dict[str, Any]:
    """Datasets and base; returns where they lie, and the trials."""
    from tunery.search.space import point_by_chance
    from tunery.spec import load

    experiment = _experiment(trials, {}, {})
    del experiment["search"]
    experiment["stages"] = {name: experiment["stages"][name] for name in ("texts", "questions", "validation", "base")}
    _tunery(_write(store / "base.yaml", experiment), store / "base")
    told, _ = load(_write(store / "all.yaml", _experiment(trials, {}, {})))
    assert told.search is not None
    points = [point_by_chance(told.search.space, told.seed, number, {}) for number in range(trials)]
    found: dict[str, Any] = {"points": points, "seed": told.seed}
    for event in (
        json.loads(line) for line in (store / "base/runs/sweep/events/driver.jsonl").read_text().splitlines()
    ):
        if event["event"] == "stage_finished":
            found[event["stage"]] = event["artifact"]
    return found


def _ours(arm: str, changes: dict[str, Any], store: Path, points: list[dict[str, Any]]) -> dict[str, Any]:
    own = store / arm.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(store / "base/artifacts", own / "artifacts")
    seconds = _tunery(_write(own / "sweep.yaml", _experiment(len(points), changes, points[0])), own)
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

    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, told=told), {"cpu": cores}),
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
    folder = Path(told["base"]) / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows, heldout = (_encoded(Path(told[name]), tokenizer) for name in ("questions", "validation"))
    scores = _perplexities(model, rows)
    keep = round(point["clean.keep.perplexity.quantile"] * len(rows))
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
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
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
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
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

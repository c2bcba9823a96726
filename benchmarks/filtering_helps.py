"""Does filtering help? Fine-tuning at equal steps on all rows, a random share, the filter's share, the intact rows.

    python benchmarks/filtering_helps.py [--seeds 17 18 19] [--epochs 1 4] [--store DIR]

The data is the quickstart's: 1,200 questions about Python's library, a fifth of them damaged on purpose, and a small
model that is pre-trained on the documentation. Four training sets:

    all       the 1,200 rows
    random    960 of them, drawn without a look
    filtered  the 960 of lowest perplexity under the base model
    intact    the 960 that were not damaged: what a perfect filter would keep

Each is trained on for the same number of optimizer steps, once a seed (of data order), and measured on held-out
questions. Prints mean and standard deviation of the held-out loss, and the difference to `all` paired by seed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tunery.store.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent
SHARE = 0.8
ARMS = ("all", "random", "filtered", "intact")


def tunery(experiment: dict[str, Any], folder: Path, store: Path) -> Path:
    """Runs it; returns the run's folder."""
    file = folder / f"{experiment['name']}.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    subprocess.run([sys.executable, "-m", "tunery", "run", str(file), "--store", str(store)], check=True)
    return store / "runs" / experiment["name"]


def artifacts(run: Path) -> dict[str, Path]:
    events = map(json.loads, (run / "events/driver.jsonl").read_text().splitlines())
    return {event["stage"]: Path(event["artifact"]) for event in events if event["event"] == "stage_finished"}


def prepare(folder: Path, store: Path) -> dict[str, Any]:
    """The quickstart's stages up to the filter; beside the experiment's file the random and the intact rows."""
    quickstart: dict[str, Any] = yaml.safe_load(
        (ROOT / "experiments/quickstart.yaml").read_text().replace("e-3", ".0e-3")
    )
    stages = quickstart["stages"]
    shared = {name: stages[name] for name in ("texts", "questions", "heldout", "base", "scored", "clean")}
    shared["clean"]["keep"]["perplexity"]["quantile"] = SHARE
    experiment = {
        "name": "prepare",
        "seed": quickstart["seed"],
        "stages": shared,
        "compute": quickstart["compute"],
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    made = artifacts(tunery(experiment, folder, store))
    rows = list(read_rows(made["questions"]))
    drawn = random.Random(0).sample(rows, round(SHARE * len(rows)))
    for name, kept in {"random": drawn, "intact": [row for row in rows if row["planted"] == ""]}.items():
        lines = (json.dumps({"messages": row["messages"]}) + "\n" for row in kept)
        (folder / f"{name}.jsonl").write_text("".join(lines))
        shared[name] = {"kind": "dataset", "source": f"{name}.jsonl"}
    return experiment


def measure(
    experiment: dict[str, Any],
    arms: tuple[str, ...],
    seeds: list[int],
    epochs: dict[float, float],
    folder: Path,
    store: Path,
) -> dict[tuple[str, float, int], float]:
    """Held-out loss by arm, epochs over all rows, and seed: one grid search, its trials side by side."""
    stage = {"all": "questions", "filtered": "clean"}
    sft = {
        "kind": "sft",
        "data": "questions",
        "model": "base",
        "epochs": 1,
        "learning_rate": 0.003,
        "global_batch_size": 8,
    }
    space = {
        "sft.data": {"choice": [stage.get(arm, arm) for arm in arms]},
        "sft.epochs": {"choice": list(epochs)},
        "sft.seed": {"choice": seeds},
    }
    evaluation = {"kind": "evaluate", "models": ["sft"], "data": {"heldout": "heldout"}}
    trials = len(arms) * len(epochs) * len(seeds)
    whole = {
        **experiment,
        "name": "-".join(arms),
        "stages": {**experiment["stages"], "sft": sft, "eval": evaluation},
        "search": {
            "metric": "eval.sft.heldout.loss",
            "mode": "min",
            "trials": trials,
            "algorithm": "grid",
            "space": space,
        },
    }
    run = tunery(whole, folder, store)
    events = [json.loads(line) for line in (run / "events/driver.jsonl").read_text().splitlines()]
    arm_of = {stage.get(arm, arm): arm for arm in arms}
    return {
        (arm_of[o["sft.data"]], epochs[o["sft.epochs"]], o["sft.seed"]): event["value"]
        for event in events
        if event["event"] == "trial_finished" and (o := event["overrides"])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19])
    parser.add_argument("--epochs", nargs="+", type=float, default=[1, 4], help="over all rows")
    parser.add_argument("--store", type=Path, help="kept, so that a second call goes on; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        store = arguments.store or Path(temporary) / "store"
        folder = store / "filtering_helps"
        folder.mkdir(parents=True, exist_ok=True)
        experiment = prepare(folder, store)
        seeds: list[int] = arguments.seeds
        losses = measure(experiment, ARMS[:1], seeds, {e: e for e in arguments.epochs}, folder, store)
        losses |= measure(experiment, ARMS[1:], seeds, {e / SHARE: e for e in arguments.epochs}, folder, store)
    print(f"{'epochs':>6}  {'rows':9} {'held-out loss':>14} {'sd':>7} {'less than all':>14} {'sd':>7}")
    for epochs in arguments.epochs:
        for arm in ARMS:
            mine = [losses[arm, epochs, seed] for seed in seeds]
            less = [losses["all", epochs, seed] - losses[arm, epochs, seed] for seed in seeds]
            shown = [statistics.mean(mine), spread(mine), statistics.mean(less), spread(less)]
            print(f"{epochs:6g}  {arm:9} {shown[0]:14.4f} {shown[1]:7.4f} {shown[2]:14.4f} {shown[3]:7.4f}")


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()

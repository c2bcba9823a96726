"""Does the same experiment end at the same losses on CPU, on one GPU and on two, under ZeRO-2 and ZeRO-3?

    python benchmarks/gpu_matches_cpu.py [--arms cpu gpu1-z2 ..] [--seeds 17 18 19] [--search]

Runs experiments/quickstart.yaml once an arm, each with a store of its own, everything from one interpreter (the corpus
is that interpreter's documentation). The CPU's seeds tell the noise; a GPU arm should lie within it. Prints losses,
their distance from the CPU's mean in standard deviations, and wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "cpu": {"device": "cpu", "workers": 2, "zero_stage": 2},
    "gpu1-z2": {"device": "gpu", "workers": 1, "zero_stage": 2},
    "gpu1-z3": {"device": "gpu", "workers": 1, "zero_stage": 3},
    "gpu2-z2": {"device": "gpu", "workers": 2, "zero_stage": 2},
    "gpu2-z3": {"device": "gpu", "workers": 2, "zero_stage": 3},
}


def run(arm: str, seed: int, search: bool, limit: float) -> tuple[dict[str, float], float]:
    """Losses by model, and seconds. An arm that takes longer than `limit` seconds has none; its log's end is shown."""
    experiment = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text())
    experiment |= {"seed": seed, "compute": ARMS[arm], "tracking": {"wandb": {"mode": "disabled"}}}
    if not search:
        experiment.pop("search")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experiment.yaml"
        file.write_text(yaml.safe_dump(experiment))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{os.environ.get('PYTHONPATH', '')}"}
        begin = time.time()
        command = [sys.executable, "-m", "tunery", "run", str(file), "--store", f"{folder}/store", "--json"]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"{arm:8} seed {seed}  was cut off after {limit:.0f} s; the last events of each log:", flush=True)
            for log in sorted(Path(folder).glob("store/runs/*/events/*.jsonl")):
                print(log.name, *(line[:300] for line in log.read_text().splitlines()[-3:]), sep="\n  ", flush=True)
            return {}, limit
        seconds = time.time() - begin
        if done.returncode:
            for log in Path(folder).glob("store/runs/*/logs/*error.txt"):
                print(log.name, log.read_text()[-3000:])
            raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
        told: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    results = told["results"]["eval"]
    return {result["model"]: result["loss"] for result in results}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[17, 18, 19], help="of the CPU arm; others use the first"
    )
    parser.add_argument("--search", action="store_true", help="run the search as well")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one arm")
    arguments = parser.parse_args()
    cpu: list[dict[str, float]] = []
    for arm in arguments.arms:
        for seed in arguments.seeds if arm == "cpu" else arguments.seeds[:1]:
            losses, seconds = run(arm, seed, arguments.search, arguments.limit)
            if arm == "cpu" and losses:
                cpu.append(losses)
            shown = "  ".join(f"{model} {loss:.4f}{distance(cpu, model, loss)}" for model, loss in losses.items())
            print(f"{arm:8} seed {seed}  {seconds:5.0f} s  {shown}", flush=True)


def distance(cpu: list[dict[str, float]], model: str, loss: float) -> str:
    """How many standard deviations of the CPU's seeds a loss lies from their mean."""
    values = [losses[model] for losses in cpu]
    if len(values) < 3:
        return ""
    return f" ({(loss - statistics.mean(values)) / statistics.stdev(values):+.1f} sd)"


if __name__ == "__main__":
    main()

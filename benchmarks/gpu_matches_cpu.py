"""Does the same experiment end at the same losses on CPU, on one GPU and on two, under ZeRO-2 and ZeRO-3?

    python benchmarks/gpu_matches_cpu.py [--arms cpu gpu1-z2 ..] [--seeds 17 18 19] [--search ARM ..] [--together]

Runs experiments/quickstart.yaml once an arm, each with a store of its own, everything from one interpreter (the corpus
is that interpreter's documentation). The CPU's seeds tell the noise; a GPU arm should lie within it. Prints losses,
their distance from the CPU's mean in standard deviations, and wall time with each training's speed. With --together
the arms run side by side on a share of the cores each, and the GPUs are common: the losses are the same, the times are
those of a busy machine.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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


@dataclass
class Arm:
    """One run of the experiment."""

    name: str
    seed: int
    search: bool
    limit: float
    """Seconds; what takes longer is cut off, and its log's end is shown."""
    cores: set[int]
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    told: list[str] = field(default_factory=list)


def run(arm: Arm) -> Arm:
    """Fills in losses by model, seconds and what else is to be told. Nothing but `arm` is touched."""
    experiment = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text())
    experiment |= {"seed": arm.seed, "compute": ARMS[arm.name], "tracking": {"wandb": {"mode": "disabled"}}}
    if not arm.search:
        experiment.pop("search")
    with tempfile.TemporaryDirectory() as folder:
        file, store = Path(folder) / "experiment.yaml", Path(folder) / "store"
        file.write_text(yaml.safe_dump(experiment))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}:{os.environ.get('PYTHONPATH', '')}"}
        # taskset, not preexec_fn: arms are started from threads.
        pinned = ["taskset", "-c", ",".join(map(str, sorted(arm.cores)))]
        command = [*pinned, sys.executable, "-m", "tunery", "run", str(file), "--store", str(store), "--json"]
        begin = time.time()
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=arm.limit
            )
        except subprocess.TimeoutExpired:
            arm.seconds = arm.limit
            arm.told.append(f"cut off after {arm.limit:.0f} s; the last events of each log:")
            for log in sorted(store.glob("runs/*/events/*.jsonl")):
                arm.told += [log.name, *("  " + line[:300] for line in log.read_text().splitlines()[-3:])]
            return arm
        arm.seconds = time.time() - begin
        if done.returncode:
            arm.told.append(f"failed: {done.stderr[-3000:]}")
            arm.told += [log.read_text()[-3000:] for log in store.glob("runs/*/logs/*error.txt")]
            return arm
        told: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        arm.losses = {result["model"]: result["loss"] for result in told["results"]["eval"]}
        arm.told.append(speeds(store))
        if arm.search:
            arm.told.append(f"search: {json.dumps(told['results'].get('search'))[:1500]}")
    return arm


def speeds(store: Path) -> str:
    """Of each training: seconds to its first step, and seconds of its steps."""
    shown = []
    for measured in sorted(store.glob("artifacts/*/runtime_stats.json")):
        values = json.loads(measured.read_text())
        if "train_seconds" in values:
            kind = measured.parent.name.split("-")[0]
            shown.append(f"{kind} launch {values['first_step_seconds']:.0f} s, steps {values['train_seconds']:.0f} s")
    return "; ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[17, 18, 19], help="of the CPU arm; others use the first"
    )
    parser.add_argument("--search", nargs="*", default=[], choices=list(ARMS), help="arms that run the search as well")
    parser.add_argument("--together", action="store_true", help="all arms side by side")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one arm")
    arguments = parser.parse_args()
    wanted = [
        (name, seed) for name in arguments.arms for seed in (arguments.seeds if name == "cpu" else arguments.seeds[:1])
    ]
    cores = sorted(os.sched_getaffinity(0))
    beside = len(wanted) if arguments.together else 1
    arms = [
        Arm(name, seed, name in arguments.search, arguments.limit, set(cores[index % beside :: beside]))
        for index, (name, seed) in enumerate(wanted)
    ]
    with ThreadPoolExecutor(beside) as pool:
        done = list(pool.map(lambda arm: show(run(arm)), arms))
    cpu = [arm.losses for arm in done if arm.name == "cpu" and arm.losses]
    print("\nin standard deviations of the CPU's seeds from their mean:")
    for arm in done:
        show(arm, cpu)


def show(arm: Arm, cpu: list[dict[str, float]] | None = None) -> Arm:
    """Prints a line: at once with all that there is to tell, and again when the CPU's losses are known."""
    losses = "  ".join(f"{model} {loss:.4f}{distance(cpu or [], model, loss)}" for model, loss in arm.losses.items())
    print(f"{arm.name:8} seed {arm.seed}  {arm.seconds:5.0f} s  {losses}", flush=True)
    if cpu is None:
        print(*("  " + line for line in arm.told), sep="\n", flush=True)
    return arm


def distance(cpu: list[dict[str, float]], model: str, loss: float) -> str:
    """How many standard deviations of the CPU's seeds a loss lies from their mean."""
    values = [losses[model] for losses in cpu]
    if len(values) < 3:
        return ""
    return f" ({(loss - statistics.mean(values)) / statistics.stdev(values):+.1f} sd)"


if __name__ == "__main__":
    main()

"""Is data work on several nodes equal to that of one process, and how much memory does the driver need?

    python benchmarks/data_on_nodes.py [--rows 1000000] [--nodes 3] [--folder DIR]

Reads made-up rows, scores their length and selects 70 % of them: once in one process without Ray, once on a cluster of
`nodes` nodes with two CPUs each on this machine (cluster/local.sh). Prints rows per second of each stage, the growth of
the driver's private memory from its first value after imports, and whether all files of the artifacts are equal. Disk:
about 3 kB a row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from local_cluster import LocalCluster  # noqa: E402

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT / 'tests' / 'support'}",
    "WANDB_MODE": "disabled",
}
EXPERIMENT = {
    "name": "rows",
    "seed": 17,
    "stages": {
        "rows": {"kind": "dataset", "source": "rows.jsonl"},
        "scored": {"kind": "score", "data": "rows", "by": [{"length": "words"}]},
        "clean": {"kind": "select", "data": "scored", "keep": {"length": {"keep_fraction": 0.7}}},
    },
    "tracking": {"wandb": {"mode": "disabled"}},
}
ONE_PROCESS = """
import sys
from pathlib import Path
from one_process import _build_stages
_build_stages(Path(sys.argv[1]), Path(sys.argv[2]), ())
"""


def write_rows(path: Path, count: int) -> None:
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("net", "file", "list", "path", "time", "text") for b in range(300)]
    with path.open("w") as file:
        for number in range(count):
            answer = " ".join(draw.choices(words, k=draw.randint(20, 200)))
            file.write(json.dumps({"question": f"What is number {number}?", "answer": answer}) + "\n")


def private_megabytes(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1024


def run(command: list[str], environment: dict[str, str], events: Path) -> tuple[dict[str, float], float]:
    """Return the seconds of each stage, and the growth of the driver's memory in MB since its first stage started."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first = most = 0.0
    while process.poll() is None:
        if events.is_file():
            now = private_megabytes(process.pid)
            first, most = first or now, max(most, now)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.stderr.read() if process.stderr else "failed")
    finished = [
        event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "stage_finished"
    ]
    return {event["stage"]: event["seconds"] for event in finished}, most - first


def files(store: Path) -> dict[str, bytes]:
    ignored = ("runtime_stats.json", "manifest.json", "checksums.json")
    paths = [path for path in sorted((store / "artifacts").rglob("*")) if path.is_file() and path.name not in ignored]
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room; default: a temporary one")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir=arguments.folder))
    cluster = LocalCluster(folder / "cluster", arguments.nodes, 2)
    try:
        write_rows(folder / "rows.jsonl", arguments.rows)
        file = folder / "rows.yaml"
        file.write_text(yaml.safe_dump(EXPERIMENT))
        size = (folder / "rows.jsonl").stat().st_size / 1e9
        print(f"{arguments.rows:,} rows, {size:.1f} GB; {os.cpu_count()} cores", flush=True)
        one, many = folder / "one", folder / "many"
        print(f"{'':>14} {'dataset':>9} {'score':>9} {'select':>9} rows/s   driver")
        results: dict[str, Any] = {}
        commands = {
            "one process": ([sys.executable, "-c", ONE_PROCESS, str(file), str(one)], {}, one / "run"),
            f"{arguments.nodes} nodes": (
                [sys.executable, "-m", "tunery", "run", str(file), "--store", str(many)],
                None,
                many / "runs" / "rows",
            ),
        }
        for name, (command, environment, run_folder) in commands.items():
            if environment is None:
                cluster.start()
                environment = cluster.driver_environment
            events = run_folder / "events" / "driver.jsonl"
            results[name] = seconds, memory = run(command, {**ENVIRONMENT, **environment}, events)
            speeds = " ".join(f"{arguments.rows / seconds[stage]:9,.0f}" for stage in EXPERIMENT["stages"])
            print(f"{name:>14} {speeds}          +{memory:,.0f} MB", flush=True)
        print("all files of the artifacts are equal" if files(one) == files(many) else "THE FILES DIFFER")
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

"""Does memory stay flat from 100,000 to 2,000,000 rows? Reads, scores and selects made-up rows; prints the curve.

    python benchmarks/memory_stays_flat.py [--rows 100000 500000 2000000] [--folder DIR]

The rows are questions and answers of 20 to 200 words, a twentieth of them copies; the scorers are those that need no
model: length, Gopher's rules, exact and near duplicates. For each size it prints the largest resident memory of the
driver and of all processes of the run together (their private parts, /proc/PID/smaps_rollup: what they share counts
once, in none), seconds, and rows a second of each stage. Disk: about 1 kB a row and copy.
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

import psutil
import yaml

EXPERIMENT = {
    "seed": 17,
    "stages": {
        "rows": {"kind": "dataset", "source": "rows.jsonl"},
        "scored": {
            "kind": "score",
            "data": "rows",
            "by": [{"length": "words"}, {"gopher": {}}, {"duplicates": "exact"}, {"near_duplicates": {}}],
        },
        "clean": {
            "kind": "select",
            "data": "scored",
            "keep": {
                "length": {"range": [5, 500]},
                "gopher": {"keep_fraction": 0.9},
                "near_duplicates": {"threshold": 0.5},
            },
        },
    },
    "tracking": {"wandb": {"mode": "disabled"}},
}


def write_rows(path: Path, count: int) -> None:
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("net", "file", "list", "path", "time", "text") for b in range(300)]
    earlier: list[str] = []
    with path.open("w") as file:
        for number in range(count):
            if earlier and draw.random() < 0.05:
                answer = draw.choice(earlier)
            else:
                answer = " ".join(draw.choices(words, k=draw.randint(20, 200)))
                if len(earlier) < 1000:
                    earlier.append(answer)
            file.write(json.dumps({"question": f"What is number {number}?", "answer": answer}) + "\n")


def private_bytes(process: psutil.Process) -> int:
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Private_"))


def run(rows: int, folder: Path) -> dict[str, float]:
    name = f"rows-{rows}"
    file, store = folder / f"{name}.yaml", folder / "store"
    file.write_text(yaml.safe_dump({"name": name, **EXPERIMENT}))
    begin = time.time()
    command = [sys.executable, "-m", "tunery", "run", str(file), "--store", str(store), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    driver, most_driver, most_all = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        try:
            family = [driver, *driver.children(recursive=True)]
            sizes = [private_bytes(member) for member in family]
            most_driver, most_all = max(most_driver, sizes[0]), max(most_all, sum(sizes))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    _out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    log = (store / "runs" / name / "events/driver.jsonl").read_text().splitlines()
    done = {e["stage"]: e for e in map(json.loads, log) if e["event"] == "stage_finished"}
    assert done["rows"]["facts"]["rows"] == rows
    assert done["clean"]["facts"]["kept"] + done["clean"]["facts"]["dropped"] == rows
    shutil.rmtree(store)
    return {
        "driver": most_driver,
        "all": most_all,
        "seconds": time.time() - begin,
        **{stage: rows / event["seconds"] for stage, event in done.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[100_000, 500_000, 2_000_000])
    parser.add_argument("--folder", type=Path, help="where there is room; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        print(f"{os.cpu_count()} cores")
        print(f"{'rows':>10} {'driver':>9} {'all':>9} {'seconds':>8}   rows/s of dataset, score, select")
        for rows in arguments.rows:
            write_rows(folder / "rows.jsonl", rows)
            told = run(rows, folder)
            print(
                f"{rows:10,} {told['driver'] / 2**20:6.0f} MB {told['all'] / 2**20:6.0f} MB {told['seconds']:8.0f}   "
                f"{told['rows']:,.0f}  {told['scored']:,.0f}  {told['clean']:,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

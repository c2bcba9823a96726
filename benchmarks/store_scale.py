"""How long do `tunery store ls`, `verify`, `gc --dry-run` and a look-up take in a store of 100,000 artifacts?

    python benchmarks/store_scale.py [--artifacts 100000] [--runs 1000] [--shards 3] [--store DIR]

Generates a store of tiny artifacts: one in 100 is a search of 20 trials, one in 10 is referred to by no run, and the
others by one run or two, whose event logs have as many progress and metric events as a training of 200 logged steps.
Prints wall and CPU seconds per command, each in a process of its own, with the files in the page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tunery.events.event_log import EventLog
from tunery.store import Store
from tunery.store.checksums import CHECKSUMS, MANIFEST, RUNTIME_STATS, files_of

KINDS = ("dataset", "score", "select", "sft", "evaluate")


def fingerprint_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:16]


def write_artifact(folder: Path, kind: str, number: int, shards: int, trials: list[str]) -> None:
    """Write an artifact as a commit does, but without waiting for the disk."""
    inputs = {"data": fingerprint_of(number - 1)} if number % len(KINDS) else {}
    facts = {"rows": number, "trials": [{"trial": trial} for trial in trials]}
    manifest = {"kind": kind, "fingerprint": fingerprint_of(number), "identity": {}, "inputs": inputs, "facts": facts}
    (folder / "rows").mkdir(parents=True)
    for shard in range(shards):
        (folder / "rows" / f"part-{shard:05d}.parquet").write_text(f"{number} {shard}")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    (folder / RUNTIME_STATS).write_text('{"seconds": 1.5}')
    listed = [(name, (folder / name).read_bytes()) for name in files_of(folder)]
    files = [{"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in listed]
    lines = ",\n".join(map(json.dumps, files))
    total = sum(len(data) for _, data in listed)
    (folder / CHECKSUMS).write_text(f'{{"bytes": {total}, "files": [\n{lines}\n]}}\n')


def write_store(store: Store, artifacts: int, runs: int, shards: int) -> None:
    choice = random.Random(17)
    logs = [EventLog(store.run(f"run-{run:05d}") / "events" / "driver.jsonl") for run in range(runs)]
    texts: list[list[str]] = [[] for _ in logs]
    for number in range(artifacts):
        is_search = number % 100 == 99
        kind = "search" if is_search else KINDS[number % len(KINDS)]
        trials = [f"trial-{fingerprint_of(number * 1000 + trial)[:8]}" for trial in range(20)] if is_search else []
        name = f"{kind}-{fingerprint_of(number)}"
        write_artifact(store.artifacts / name, kind, number, shards, trials)
        if number % 10 == 4:
            continue
        for run in choice.sample(range(runs), choice.choice([1, 2])):
            event = {"t": time.time(), "event": "stage_finished", "kind": kind, "facts": {"rows": number}}
            logged = [{"t": time.time(), "event": "trial_finished", "trial": trial} for trial in trials]
            path = str(store.artifacts / name)
            texts[run] += map(
                json.dumps, logged or [{**event, "fingerprint": fingerprint_of(number), "artifact": path}]
            )
    steps = [
        json.dumps({"t": time.time(), "event": event, "stage": "sft", "step": step, "values": {"loss": 1 / (step + 1)}})
        for step in range(200)
        for event in ("progress", "metrics")
    ]
    for log, lines in zip(logs, texts, strict=True):
        log.path.write_text("\n".join([*lines, *steps]) + "\n")


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds_of(*command: str) -> tuple[float, float, str]:
    """Return wall and CPU seconds of a command, and its last line."""
    start, cpu_before = time.perf_counter(), cpu_seconds_of_children()
    done = subprocess.run([sys.executable, "-m", "tunery", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds = time.perf_counter() - start
    return seconds, cpu_seconds_of_children() - cpu_before, done.stdout.rstrip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--store", type=Path, help="keep the store in this folder; one that exists is used as it is")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(arguments.store or Path(folder))
        if not store.artifacts.is_dir():
            start = time.perf_counter()
            write_store(store, arguments.artifacts, arguments.runs, arguments.shards)
            print(f"{arguments.artifacts:,} artifacts written in {time.perf_counter() - start:.0f} s", flush=True)
        option = ("--store", str(store.root))
        for words in (
            ("store", "ls", "--help"),
            ("store", "ls", *option),
            ("store", "ls", "--sort", "size", "--json", *option),
            ("store", "gc", "--dry-run", *option),
            ("store", "verify", *option),
        ):
            seconds, cpu_seconds, last_line = seconds_of(*words)
            print(f"{seconds:6.2f} s ({cpu_seconds:.2f} s CPU)  tunery {' '.join(words[:3])}: {last_line}", flush=True)
        start = time.perf_counter()
        for number in range(1000):
            store.find(KINDS[number % len(KINDS)], fingerprint_of(number))
        print(f"{(time.perf_counter() - start):6.2f} ms  Store.find")


if __name__ == "__main__":
    main()

"""What happens when something fails: kills, freezes and fills things while each kind of stage runs, and prints a table.

    python benchmarks/faults.py [--faults NAME ...] [--stages NAME ...] [--folder DIR] [--out table.md]

Each combination runs on a cluster of three nodes on this machine (cluster/local.sh). After the fault the run must
finish, or end with an error that names the cause and finish when the same command is run again. The table shows which,
the seconds from the fault to the error and to the end, rows lost, whether the artifacts equal those of an undisturbed
run to the byte, and whether CPUs stayed reserved or processes were left. It needs Linux; as root it also fills a disk
(a tmpfs) and freezes a file system (ext4 on a loop device).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from local_cluster import LocalCluster, signal_node  # noqa: E402

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT / "platform"),
    "WANDB_MODE": "disabled",
    "COLUMNS": "200",
}
WAIT_SECONDS = 300.0
SCORED_ROWS = 12_288
DATASET_ROWS = 300_000


# Stages: an experiment for each, and the moment of the fault.

ROWS = {"kind": "dataset", "source": "builtin:python-docs", "split": "train"}
UPSTREAM = {
    "texts": {**ROWS, "subset": "texts", "limit": 150},
    "questions": {**ROWS, "subset": "questions", "limit": 120},
    "base": {
        "kind": "pretrain",
        "data": "texts",
        "model": {"scratch": "tiny"},
        "epochs": 1,
        "learning_rate": 2.0e-3,
        "global_batch_size": 4,
        "max_length": 128,
    },
}
SFT = {"kind": "sft", "model": "base", "data": "questions", "learning_rate": 1.0e-3, "global_batch_size": 4}
REWARD = "def reward(prompts, responses):\n    return [len(set(text)) / 50 for text in responses]\n"


@dataclass(frozen=True)
class Case:
    """A kind of stage."""

    stages: dict[str, Any]
    kind: str
    """Kind of the artifact that is compared."""
    ready: str
    """Glob in the store: the fault comes when it has `count` matches."""
    process: str
    """Title of a process that does the work."""
    count: int = 2
    extra: dict[str, Any] = field(default_factory=dict)


CASES = {
    "dataset": Case(
        {"rows": {"kind": "dataset", "source": "rows.jsonl"}}, "dataset", "work/dataset-*/read-*/0*", "ray::MapWorker"
    ),
    "score": Case(
        {
            **UPSTREAM,
            "rows": {"kind": "dataset", "source": "few.jsonl"},
            "scored": {"kind": "score", "data": "rows", "by": [{"perplexity": "base"}]},
        },
        "score",
        "work/score-*/passes/*/part-*.parquet",
        "ray::RayTrainWorker",
    ),
    "sft": Case(
        {**UPSTREAM, "sft": {**SFT, "epochs": 6}},
        "sft",
        "work/sft-*/checkpoints/*/whole",
        "ray::RayTrainWorker",
        count=1,  # a new checkpoint replaces the one before
    ),
    "ppo": Case(
        {
            **UPSTREAM,
            "ppo": {
                "kind": "ppo",
                "model": "base",
                "data": "questions",
                "reward": {"python": "reward.py"},
                "learning_rate": 1.0e-4,
                "global_batch_size": 8,
                "epochs": 1,
                "sampling": {"max_new_tokens": 12},
            },
        },
        "ppo",
        "work/ppo-*/checkpoints/*/whole",
        "ray::RayTrainWorker",
        count=1,
    ),
    "search": Case(
        {**UPSTREAM, "sft": {**SFT, "epochs": 3, "tuner": {"lora": {"rank": 4}}, "eval_data": "questions"}},
        "search",
        "work/sft-*/checkpoints/*/whole",
        "ray::PackActor",
        3,
        {
            "search": {
                "metric": "sft.eval_loss",
                "mode": "min",
                "algorithm": "grid",
                "trials": 4,
                "space": {"sft.learning_rate": {"choice": [1e-4, 3e-4, 1e-3, 3e-3]}},
            }
        },
    ),
}


@dataclass
class Attempt:
    """A run that is about to be disturbed."""

    cluster: LocalCluster
    case: Case
    folder: Path
    store: Path
    driver: subprocess.Popen[str]


# Faults. Each returns a function that repairs what it broke, called before the same command is run again.

Repair = Callable[[], object]


def nothing() -> None:
    pass


def worker_killed(attempt: Attempt) -> Repair:
    attempt.cluster.processes(attempt.case.process)[0].kill()
    return nothing


def node_killed(attempt: Attempt) -> Repair:
    signal_node(attempt.cluster.node_of_a_worker(attempt.case.process), signal.SIGKILL)
    return attempt.cluster.start


def node_frozen_for_30_s(attempt: Attempt) -> Repair:
    group = attempt.cluster.node_of_a_worker(attempt.case.process)
    signal_node(group, signal.SIGSTOP)
    time.sleep(30)
    signal_node(group, signal.SIGCONT)
    return attempt.cluster.start


def node_frozen_for_good(attempt: Attempt) -> Repair:
    signal_node(attempt.cluster.node_of_a_worker(attempt.case.process), signal.SIGSTOP)
    return attempt.cluster.start


def head_killed(attempt: Attempt) -> Repair:
    signal_node(attempt.cluster.groups()[0], signal.SIGKILL)
    return attempt.cluster.start


def driver_killed(attempt: Attempt) -> Repair:
    attempt.driver.kill()
    return nothing


def driver_interrupted(attempt: Attempt) -> Repair:
    attempt.driver.send_signal(signal.SIGINT)
    return nothing


def disk_full(attempt: Attempt) -> Repair:
    filler = attempt.store.parent / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass
    return filler.unlink


def store_frozen_for_60_s(attempt: Attempt) -> Repair:
    mount = str(attempt.store.parent)
    subprocess.run(["fsfreeze", "-f", mount], check=True)
    time.sleep(60)
    subprocess.run(["fsfreeze", "-u", mount], check=True)
    return nothing


FAULTS: dict[str, Callable[[Attempt], Repair]] = {
    "worker killed": worker_killed,
    "node killed": node_killed,
    "node frozen 30 s": node_frozen_for_30_s,
    "node frozen": node_frozen_for_good,
    "head killed": head_killed,
    "driver killed": driver_killed,
    "Ctrl-C": driver_interrupted,
    "disk full": disk_full,
    "store frozen 60 s": store_frozen_for_60_s,
}
DISKS = {"disk full": "tmpfs", "store frozen 60 s": "ext4"}
"""File system that the store of a fault is on."""


def write_inputs(folder: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog and reads the documentation of the standard library "
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(DATASET_ROWS):
            file.write(json.dumps({"text": f"{n} " + text * 10}) + "\n")
    with (folder / "few.jsonl").open("w") as file:
        for n in range(SCORED_ROWS):
            file.write(json.dumps({"text": f"{n} " + text[: n % 90]}) + "\n")
    (folder / "reward.py").write_text(REWARD)


def write_experiment(folder: Path, name: str, case: Case) -> Path:
    experiment = {
        "name": name,
        "seed": 17,
        "stages": case.stages,
        "compute": {"workers": 2, "cpus_per_worker": 2, "device": "cpu", "save_steps": 5},
        **case.extra,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return file


def start(file: Path, store: Path, cluster: LocalCluster) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tunery", "run", str(file), "--store", str(store)],
        env={**ENVIRONMENT, **cluster.driver_environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def compared(store: Path, kind: str) -> dict[str, Any]:
    """Return what must be equal after a fault: the files of the artifacts; of a search the outcome of each trial."""
    artifacts = sorted((store / "artifacts").glob(f"{kind}-*"))
    if kind == "search":
        trials = json.loads((artifacts[0] / "manifest.json").read_text())["facts"]["trials"]
        return {trial["trial"]: (trial["state"], trial["value"]) for trial in trials}
    ignored = ("runtime_stats.json", "manifest.json", "checksums.json")
    return {
        str(path.relative_to(store)): path.read_bytes()
        for artifact in artifacts
        for path in sorted(artifact.rglob("*"))
        if path.is_file() and path.name not in ignored
    }


def rows(store: Path) -> int:
    """Number of rows in all artifacts, by their facts."""
    return sum(
        int(json.loads(path.read_text())["facts"].get("rows", 0)) for path in store.glob("artifacts/*/manifest.json")
    )


class Disk:
    """A folder for stores: on a file system of its own if the fault needs one, which only root can mount."""

    def __init__(self, folder: Path, kind: str | None, megabytes: int = 900) -> None:
        folder.mkdir(parents=True)
        self.folder, self._kind = folder, kind
        if kind == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
        elif kind == "ext4":
            image = folder.with_suffix(".img")
            with image.open("wb") as file:
                file.truncate(megabytes << 20)
            subprocess.run(["mkfs.ext4", "-q", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, folder], check=True)

    def close(self) -> None:
        if self._kind is not None:
            subprocess.run(["umount", "-l", self.folder], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_suffix(".img").unlink(missing_ok=True)


def upstream_store(store: Path, case: Case) -> Callable[[str, list[str]], set[str]]:
    """For `shutil.copytree`: ignore runs, leases and the artifacts that the case builds."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        if Path(folder) == store:
            return {"runs", "leases", "work", "scores"} & set(names)
        built = {case.kind} | ({"sft"} if case.kind == "search" else set())
        return {name for name in names if Path(folder).name == "artifacts" and name.rpartition("-")[0] in built}

    return ignore


def disturb(fault: str, name: str, cluster: LocalCluster, folder: Path, reference: Path, file: Path) -> list[str]:
    """Run one combination; return the row of the table."""
    case = CASES[name]
    disk = Disk(folder / f"disk-{time.time_ns()}", DISKS.get(fault))
    store = disk.folder / "store"
    try:
        shutil.copytree(reference, store, ignore=upstream_store(reference, case))
        driver = start(file, store, cluster)
        attempt = Attempt(cluster, case, folder, store, driver)
        end = time.monotonic() + WAIT_SECONDS
        while len([*store.glob(case.ready)]) < case.count:
            if driver.poll() is not None or time.monotonic() > end:
                driver.kill()
                return [fault, name, "the moment of the fault did not come", "", "", "", "", ""]
            time.sleep(0.05)
        began = time.monotonic()
        repair = FAULTS[fault](attempt)
        try:
            _, err = driver.communicate(timeout=WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.communicate()
            err = f"error: still waiting after {WAIT_SECONDS:.0f} s"
        to_error = ""
        outcome = "finished"
        if driver.returncode:
            to_error = f"{time.monotonic() - began:.0f}"
            found = re.findall(r"^(?:error|cause): (.*)", err, re.MULTILINE)
            outcome = "resumed; " + " / ".join(line[:90] for line in found[:2])
            if "Traceback" in err:
                outcome += " / TRACEBACK"
            repair()
            repair = nothing
            again = start(file, store, cluster)
            out, err = again.communicate(timeout=2 * WAIT_SECONDS)
            if again.returncode:
                return [fault, name, f"FAILED AGAIN: {(err or out).strip()[-200:]}", to_error, "", "", "", ""]
        seconds = time.monotonic() - began
        lost = rows(reference) - rows(store)
        equal = compared(store, case.kind) == compared(reference, case.kind)
        reserved = cluster.reserved_cpus()
        repair()
        left = [*(store / "work").glob("*")] if (store / "work").is_dir() else []
        return [
            fault,
            name,
            outcome,
            to_error,
            f"{seconds:.0f}",
            str(lost),
            "yes" if equal else "NO",
            ", ".join([*([f"{reserved:g} CPUs"] if reserved else []), *(path.name[:12] for path in left)]) or "nothing",
        ]
    finally:
        disk.close()


HEADER = ["fault", "stage", "outcome", "s to error", "s to end", "rows lost", "equal bytes", "left behind"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=[*FAULTS])
    parser.add_argument("--stages", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--folder", type=Path, help="where there is room for 3 GB; default: a temporary one")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=arguments.folder))
    cluster = LocalCluster(folder / "cluster", 3, 2)
    lines = [f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER)]
    print("\n".join(lines), flush=True)
    try:
        write_inputs(folder)
        cluster.start()
        for name in arguments.stages:
            reference = folder / f"reference-{name}" / "store"
            file = write_experiment(folder, name, CASES[name])
            began = time.monotonic()
            undisturbed = start(file, reference, cluster)
            out, err = undisturbed.communicate(timeout=2 * WAIT_SECONDS)
            if undisturbed.returncode:
                raise SystemExit(f"{name} fails without a fault:\n{out}{err}")
            print(f"| none | {name} | finished | | {time.monotonic() - began:.0f} | 0 | | |", flush=True)
            for fault in arguments.faults:
                if fault in DISKS and os.geteuid():
                    continue
                row = disturb(fault, name, cluster, folder, reference, file)
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
                if len(cluster.groups()) < 3 or "FAILED" in row[2]:
                    cluster.start()
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

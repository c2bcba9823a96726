"""Raylet, driver and actors are killed while Ray Data scores rows: no row is lost or scored twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from processes import raylet_pid, worker_pids
from workspace import ENVIRONMENT, ROOT, Workspace, wait_for

ROWS = 20_480  # 20 shards


def prepared(bench: Workspace, complete_run: Workspace) -> Workspace:
    """Write an experiment that scores many short rows with the base model of the small experiment."""
    words = ["path", "join", "list", "sort", "file", "open", "read", "line", "text", "code"]
    with (bench.folder / "rows.jsonl").open("w") as file:
        for n in range(ROWS):
            # A shard takes about a second, so that there is time to kill something.
            file.write(json.dumps({"text": f"{n} " + " ".join(words[n % 10 :] * (n % 7))}) + "\n")

    def change(experiment: dict) -> None:
        kept = {name: experiment["stages"][name] for name in ("texts", "base")}
        kept["rows"] = {"kind": "dataset", "source": "rows.jsonl"}
        kept["scored"] = {"kind": "score", "data": "rows", "by": [{"perplexity": "base"}, {"ifd": "base"}]}
        experiment["stages"] = kept

    bench.write(change)
    for kind in ("dataset", "pretrain"):
        for artifact in complete_run.artifacts(kind):
            shutil.copytree(artifact, bench.store / "artifacts" / artifact.name)
    return bench


def parts(bench: Workspace) -> list[Path]:
    return list(bench.store.glob("work/score-*/passes/*/part-*.parquet"))


def in_process(bench: Workspace) -> Path:
    """Compute the same scores without Ray, in another store. Returns the artifact."""
    store = bench.folder / "undisturbed"
    shutil.copytree(bench.store, store)
    return Path(bench.without_ray(store)["scored"]["path"])


def test_no_row_is_lost_or_scored_twice_after_raylet_driver_and_actor_kills(
    complete_run: Workspace, tmp_path: Path
) -> None:
    bench = prepared(Workspace(tmp_path), complete_run)
    undisturbed = in_process(bench)

    soon = {"RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "1000"}
    first = bench.start(**soon)
    wait_for(lambda: len(parts(bench)) >= 2, process=first)
    raylet = raylet_pid(bench)
    assert raylet is not None
    os.kill(raylet, signal.SIGKILL)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 1, out + err
    assert "Traceback" not in out + err
    # The workers die with the raylet; the driver may notice either first.
    assert "raylet" in err or "a worker process was killed" in err
    assert "the same command" in err

    before = len(parts(bench))
    second = bench.start()
    wait_for(lambda: len(parts(bench)) >= before + 2, process=second)
    left = worker_pids(bench)
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), seconds=60)

    before = len(parts(bench))
    assert before < 20, "too late to disturb anything"
    third = bench.start()
    wait_for(lambda: len(parts(bench)) > before, process=third)
    os.kill(worker_pids(bench)[0], signal.SIGKILL)
    out, err = third.communicate(timeout=120)
    assert third.returncode == 0, out + err

    scored = bench.only("score")
    for path in sorted((undisturbed / "scores").iterdir()):
        assert path.read_bytes() == (scored / "scores" / path.name).read_bytes(), path.name
    assert (scored / "quarantine.jsonl").read_bytes() == b""
    measured = json.loads((scored / "runtime_stats.json").read_text())
    assert measured["rows_resumed"] + measured["rows_scored"] == ROWS
    assert measured["rows_resumed"] >= 4 * 1024
    assert len({row for path in scored.glob("rows/*") for row in pq.read_table(path)["id"].to_pylist()}) == ROWS


def test_only_new_rows_are_scored(complete_run: Workspace, tmp_path: Path) -> None:
    bench = prepared(Workspace(tmp_path), complete_run)
    text = (bench.folder / "rows.jsonl").read_text().splitlines(keepends=True)[:3000]
    (bench.folder / "rows.jsonl").write_text("".join(text))
    in_process_here(bench)
    new = [json.dumps({"text": f"a new row {n}"}) + "\n" for n in range(30)]
    (bench.folder / "rows.jsonl").write_text("".join([*new[:10], *text[:2000], *new[10:], *text[2000:]]))
    scored = in_process_here(bench)
    measured = json.loads((scored / "runtime_stats.json").read_text())
    assert (measured["rows_scored"], measured["rows_cached"]) == (30, 3000)


def in_process_here(bench: Workspace) -> Path:
    shutil.rmtree(bench.folder / "undisturbed", ignore_errors=True)
    scored = in_process(bench)
    shutil.copytree(bench.folder / "undisturbed" / "scores", bench.store / "scores", dirs_exist_ok=True)
    return scored


KILLER = """
import os, sys
from pathlib import Path
import ray
from tunery.scoring.score_shard import ScorePass, score_shard
from tunery.workers.map_tasks import map_on_cpus

class Actor:
    def __init__(self, job):
        self.job = job
    def __call__(self, batch):
        def score(rows, scores):
            if any(row["text"] == "row 700" for row in rows):
                os.kill(os.getpid(), 9)
            return {"a": {"score": [1.0] * len(rows)}}
        counts = [score_shard(Path(shard), self.job, score) for shard in batch["shard"]]
        return {key: [shard[key] for shard in counts] for key in counts[0]}

folder = Path(sys.argv[1])
ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
job = ScorePass(("a",), folder / "out", "run")
units = [{"shard": str(path)} for path in sorted((folder / "rows").iterdir())]
counts = list(map_on_cpus(Actor, (job,), units, 2, 20))
print("rows", sum(shard["scored"] for shard in counts), sum(shard["failed"] for shard in counts))
"""


ALWAYS_KILLED = """
import os
import ray
from tunery.workers.map_tasks import map_on_cpus

class Actor:
    def __call__(self, batch):
        os.kill(os.getpid(), 9)

ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
try:
    list(map_on_cpus(Actor, (), [{"task": 1}], 1, 2))
except ray.exceptions.RayActorError:
    print("failed")
"""


def test_task_that_always_kills_its_actor_fails() -> None:
    """An actor that runs out of memory, for example, is not restarted for ever."""
    command = [sys.executable, "-c", ALWAYS_KILLED]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert "failed" in done.stdout.splitlines(), done.stdout + done.stderr


def test_row_that_crashes_its_actor_is_quarantined_and_the_stage_completes(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "platform"))
    from tunery.store.rows import row_id, write_rows

    rows = ({"text": f"row {n}"} for n in range(2500))
    write_rows(({**row, "id": row_id(row)} for row in rows), tmp_path)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "rows 2499 1" in done.stdout.splitlines()
    assert json.loads((tmp_path / "out" / "part-00000.failed.json").read_text()) == {
        "700": "its worker crashed 3 times, the last time on this row alone"
    }

"""`tunery submit` on a cluster of three nodes (cluster/local.sh): jobs are checked, run, stopped, resumed, listed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from local_cluster import LocalCluster
from workspace import ENVIRONMENT, Workspace, facts, wait_for


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables for a cluster of three nodes with one CPU each."""
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster") / "state", 3, 1)
    try:
        cluster.start()
        yield cluster.environment
    finally:
        cluster.stop()


def write(bench: Workspace, **stages: dict) -> None:
    rows = {"kind": "dataset", "source": "builtin:python-docs", "split": "train"}
    experiment = {
        "name": "small",
        "seed": 17,
        "stages": {
            "texts": {**rows, "subset": "texts", "limit": 60},
            "base": {
                "kind": "pretrain",
                "data": "texts",
                "model": {"scratch": "tiny"},
                "epochs": 4,
                "learning_rate": 2.0e-3,
                "global_batch_size": 6,
                "max_length": 64,
            },
            **stages,
        },
        "compute": {"workers": 3, "save_steps": 5, "device": "cpu"},
    }
    bench.file.write_text(yaml.safe_dump(experiment, sort_keys=False))


def run(bench: Workspace, cluster: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command that has no --store."""
    return subprocess.run(
        bench.command(*words),
        env={**ENVIRONMENT, **cluster},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=bench.folder,
    )


def checkpoints(bench: Workspace) -> list[Path]:
    return [*bench.store.glob("work/pretrain-*/checkpoints/checkpoint-*/whole")]


def status(bench: Workspace, cluster: dict[str, str], job: str) -> str:
    return str(json.loads(run(bench, cluster, "status", job, "--json").stdout)["status"])


def test_job_is_stopped_and_resumed_and_ends_on_all_nodes(tmp_path: Path, cluster: dict[str, str]) -> None:
    bench = Workspace(tmp_path)
    write(bench)
    (tmp_path / "rewards.py").write_text("# shipped\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "not shipped"}\n')
    done = bench.tunery("submit", str(bench.file), "--json", **cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    first = json.loads(done.stdout)
    assert {path for path in first["files"] if not path.startswith("tunery/")} == {
        "experiment/experiment.yaml",
        "experiment/rewards.py",
    }

    wait_for(lambda: checkpoints(bench), 240)
    stopped = run(bench, cluster, "stop", first["job"])
    assert stopped.returncode == 0, stopped.stderr
    wait_for(lambda: status(bench, cluster, first["job"]) == "stopped", 150)
    assert (bench.run / "report.html").is_file(), "the run saved its state"
    assert checkpoints(bench)

    bench.file.unlink()  # the cluster has the package
    resumed = run(bench, cluster, "submit", "--resume", first["job"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "base: done" in resumed.stdout, "it follows the output of the job"
    model = bench.only("pretrain")
    assert 0 < json.loads((model / "runtime_stats.json").read_text())["resumed_from"] < facts(model)["steps"]
    listed = json.loads(run(bench, cluster, "jobs", "--json").stdout)
    assert [(job["experiment"], job["status"]) for job in listed] == [("small", "succeeded"), ("small", "stopped")]
    assert "base: done" in run(bench, cluster, "logs", listed[0]["job"]).stdout
    again = run(bench, cluster, "submit", "--resume", "no-such-job")
    assert again.returncode == 1
    assert "no-such-job does not exist" in again.stderr


def test_experiment_that_can_not_run_there_is_refused_before_a_job_starts(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    bench = Workspace(tmp_path)
    missing = {"kind": "dataset", "source": "/no/such/rows.jsonl"}
    write(bench, more=missing)
    refused = bench.tunery("submit", str(bench.file), **cluster)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "/no/such/rows.jsonl is not visible on" in refused.stderr
    write(bench)
    bench.file.write_text(bench.file.read_text().replace("workers: 3", "workers: 3\n  cpus_per_worker: 2"))
    refused = bench.tunery("submit", str(bench.file), **cluster)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "compute needs 3 workers with 2 CPUs each" in refused.stderr or "no place for 3 workers" in refused.stderr
    wrong_token = {**cluster, "RAY_AUTH_TOKEN": "0" * 64}
    refused = bench.tunery("submit", str(bench.file), **wrong_token)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "did not accept the token" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_ctrl_c_detaches_and_the_job_ends(tmp_path: Path, cluster: dict[str, str]) -> None:
    bench = Workspace(tmp_path)
    write(bench)
    process = subprocess.Popen(
        bench.command("submit", str(bench.file), "--store", str(bench.store)),
        env={**ENVIRONMENT, **cluster, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=bench.folder,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "texts: done" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, "".join(lines) + rest
    assert "detached" in rest
    wait_for(lambda: bench.artifacts("pretrain"), 240)

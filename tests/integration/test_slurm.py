"""cluster/slurm.sh and cluster/request_workers.py with a real `ray symmetric-run` of one node. Only `srun` and
`scontrol` are replaced.

`ray symmetric-run` refuses to start beside another Ray and ends with `ray stop`, which stops every Ray that it sees. So
the job has a PID namespace of its own, like that of a container.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from workspace import ENVIRONMENT, ROOT, Workspace

NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
PYTHON = Path(sys.executable)
REQUEST = ROOT / "cluster" / "request_workers.py"
PROGRAMS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": "hostname",
    "python": f'exec {PYTHON} "$@"',
    "ray": f'exec {PYTHON.parent}/ray "$@"',
    # As in cluster/kuberay/rayjob.yaml: tunery starts when the workers have joined.
    "tunery": f"""
        {PYTHON} {REQUEST} --cpus 64 --timeout 0.1
        exec {PYTHON} {REQUEST} --cpus 2 -- {PYTHON} -m tunery "$@"
    """,
}


def has_namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not has_namespaces(), reason="the kernel does not allow PID namespaces")
def test_experiment_runs_on_the_ray_that_symmetric_run_starts(tmp_path: Path) -> None:
    bench = Workspace(tmp_path)
    stages = {
        "texts": {"kind": "dataset", "source": "builtin:python-docs", "split": "train", "subset": "texts", "limit": 60},
        "scored": {"kind": "score", "data": "texts", "by": [{"length": "chars"}]},
        "kept": {"kind": "select", "data": "scored", "keep": {"length": {"keep_fraction": 0.5}}},
    }
    bench.file.write_text(yaml.safe_dump({"name": "small", "seed": 17, "stages": stages}))
    programs = tmp_path / "env" / "bin"
    programs.mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    job = str(os.getpid())
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "this",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_NODEID": "0",
        "TUNERY_ENV": str(programs.parent),
        "TUNERY_STORE": str(bench.store),
    }
    done = subprocess.run(
        [*NAMESPACE, str(ROOT / "cluster" / "slurm.sh"), str(bench.file)],
        env={name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_")} | slurm,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the cluster has 2 of 64 CPUs" in done.stderr
    assert "kept: done" in done.stdout
    assert [event["event"] for event in bench.events()].count("ray_connecting") == 1, "to the Ray of the job"
    assert len(bench.artifacts("select")) == 1
    assert not Path(f"/tmp/tunery-{job}").exists()
    assert list(tmp_path.glob(".tunery-slurm-*")) == [], "the token is removed"

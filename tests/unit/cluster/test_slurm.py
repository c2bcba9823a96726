"""cluster/slurm.sh without Slurm and Ray: its options, the token, the ports, signals and requeueing. `srun`,
`scontrol`, `ray` and `tunery` are scripts."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "cluster" / "slurm.sh"
PROGRAMS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": """
        case $1 in
        show) hostname ;;
        requeue) echo "$2" >>"$SLURM_SUBMIT_DIR/requeued" ;;
        esac
    """,
    "ray": """
        printf '%s\\n' "$@" >"$SLURM_SUBMIT_DIR/ray-words"
        env >"$SLURM_SUBMIT_DIR/ray-environment"
        stat -c %a "$RAY_AUTH_TOKEN_PATH" "$TUNERY_JOB" "$TUNERY_TEMP" >"$SLURM_SUBMIT_DIR/modes"
        while [[ $1 != -- ]]; do shift; done
        shift
        "$@"
    """,
    "tunery": """
        printf '%s\\n' "$@" >"$SLURM_SUBMIT_DIR/tunery-words"
        trap 'echo saved >"$SLURM_SUBMIT_DIR/saved"; exit 130' TERM
        while [[ ! -e $SLURM_SUBMIT_DIR/end ]]; do sleep 0.05; done
        exit "$(<"$SLURM_SUBMIT_DIR/end")"
    """,
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose folder is `tmp_path`."""
    programs = tmp_path / "env" / "bin"
    programs.mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "TUNERY_ENV": str(tmp_path / "env"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": f"9{os.getpid()}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "64",
        "SLURM_NODEID": "0",
    }


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [str(SCRIPT), "my experiment.yaml"],
        env=environment,
        cwd=environment["SLURM_SUBMIT_DIR"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(Path(environment["SLURM_SUBMIT_DIR"]) / "tunery-words", process)
    return process


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path.name} does not exist"
        time.sleep(0.02)


def folder_of(environment: dict[str, str]) -> Path:
    return Path(environment["SLURM_SUBMIT_DIR"])


def test_experiment_runs_on_the_head_and_the_exit_code_is_that_of_tunery(environment: dict[str, str]) -> None:
    process = start(environment)
    folder = folder_of(environment)
    (folder / "end").write_text("3")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 3, output
    words = (folder / "tunery-words").read_text().splitlines()
    assert words == ["run", "my experiment.yaml", "--store", "/shared/store"]
    assert not (folder / "requeued").exists()
    assert list(folder.glob(".tunery-slurm-*")) == [], "the token is removed"
    assert not Path(f"/tmp/tunery-{environment['SLURM_JOB_ID']}").exists()


def test_ray_requires_a_token_that_only_the_user_can_read(environment: dict[str, str]) -> None:
    process = start({**environment, "RAY_AUTH_TOKEN": "of another cluster"})
    folder = folder_of(environment)
    (folder / "end").write_text("0")
    process.communicate(timeout=30)
    assert (folder / "modes").read_text().split() == ["600", "700", "700"]
    passed = dict(line.split("=", 1) for line in (folder / "ray-environment").read_text().splitlines() if "=" in line)
    assert passed["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in passed
    words = (folder / "ray-words").read_text().splitlines()
    assert "--dashboard-host=127.0.0.1" in words
    assert words[:6] == ["symmetric-run", "--address", passed["RAY_ADDRESS"], "--min-nodes", "2", words[5]]
    assert not passed["RAY_ADDRESS"].startswith("127."), "the other nodes connect to it"


def test_ports_depend_on_the_job(environment: dict[str, str]) -> None:
    addresses = []
    for job in (environment["SLURM_JOB_ID"], str(int(environment["SLURM_JOB_ID"]) + 1)):
        process = start({**environment, "SLURM_JOB_ID": job})
        folder = folder_of(environment)
        (folder / "end").write_text("0")
        process.communicate(timeout=30)
        words = (folder / "ray-words").read_text()
        ports = [int(port) for port in re.findall(r"(?:port=|:)(\d+)$", words, flags=re.M)]
        assert len(set(ports)) == 3
        assert all(20000 <= port < 32768 for port in ports), "not those of outgoing connections"
        addresses += ports
        (folder / "end").unlink()
        (folder / "tunery-words").unlink()
    assert len(set(addresses)) == 6


def test_run_saves_its_state_and_is_requeued_before_the_time_limit(environment: dict[str, str]) -> None:
    process = start(environment)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    folder = folder_of(environment)
    assert (folder / "saved").exists(), output
    assert (folder / "requeued").read_text().split() == [environment["SLURM_JOB_ID"]]


def test_cancelled_run_saves_its_state_and_is_not_requeued(environment: dict[str, str]) -> None:
    process = start(environment)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    folder = folder_of(environment)
    assert process.returncode == 130, output
    assert (folder / "saved").exists()
    assert not (folder / "requeued").exists()


def test_run_that_ended_by_itself_is_not_requeued(environment: dict[str, str]) -> None:
    program = folder_of(environment) / "env" / "bin" / "tunery"
    program.write_text(program.read_text().replace("exit 130", "exit 0"))
    process = start(environment)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not (folder_of(environment) / "requeued").exists()


def test_exit_code_is_that_of_the_driver_although_ray_returns_another_one(environment: dict[str, str]) -> None:
    program = folder_of(environment) / "env" / "bin" / "ray"
    program.write_text(f"{program.read_text()}\nexit 1\n")
    process = start(environment)
    (folder_of(environment) / "end").write_text("0")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output


def test_folder_of_another_user_in_tmp_is_refused(environment: dict[str, str]) -> None:
    link = Path(f"/tmp/tunery-{environment['SLURM_JOB_ID']}")
    link.symlink_to(folder_of(environment))
    try:
        done = subprocess.run(
            [str(SCRIPT), "x.yaml"], env=environment, cwd=folder_of(environment), capture_output=True, check=False
        )
    finally:
        link.unlink()
    assert done.returncode == 1
    assert not (folder_of(environment) / "ray-words").exists()


def test_job_takes_complete_nodes_and_can_be_requeued() -> None:
    options = set(re.findall(r"^#SBATCH (--[\w-]+)", SCRIPT.read_text(), flags=re.M))
    assert {"--exclusive", "--requeue", "--signal", "--ntasks-per-node", "--open-mode"} <= options
    assert stat.S_IMODE(SCRIPT.stat().st_mode) & 0o111

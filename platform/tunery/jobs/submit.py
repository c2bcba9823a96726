"""`tunery submit`: check a cluster, ship an experiment to it and start it there as a Ray job.

The job runs `tunery run` on the cluster's head node. A later attempt needs only the store: the same command, or `tunery
submit --resume JOB` from any machine, resumes from the finished stages and the last checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tunery
from tunery.errors import RequestError, TuneryError
from tunery.ingest.filesystem import REMOTE
from tunery.ingest.formats.hub import PREFIX
from tunery.ingest.sources import sources_of
from tunery.jobs.cluster import JobsApi
from tunery.jobs.package import EXPERIMENT, ShippedFile, find_files, write_package
from tunery.jobs.preflight import NodeReport, check_nodes, check_placement, cluster_hardware, version_notes
from tunery.jobs.probe import REPORT_PREFIX
from tunery.pipeline.cache_keys import model_folder, pretrained_models
from tunery.pipeline.compute import batch_sizes, resolve_compute
from tunery.spec import Dataset, Experiment, PythonReward, Review, load

POLL_SECONDS = 0.5
MAX_POLL_SECONDS = 10.0
PROBE_SECONDS = 180.0
"""Time limit for the probe, which starts a process on each node."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_SECONDS = 120
"""How long Ray waits after SIGTERM before it kills a job: a run first saves its event log and report."""


@dataclass(frozen=True)
class Submission:
    """A job that was started."""

    job: str
    """Its name, for `tunery status`, `logs` and `stop`."""
    address: str
    store: str
    files: Sequence[ShippedFile]
    notes: Sequence[str] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "address": self.address,
            "store": self.store,
            "files": {str(file.destination): file.size for file in self.files},
            "notes": list(self.notes),
        }


def submit(
    file: Path,
    store: Path,
    api: JobsApi,
    env: Sequence[str] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> Submission:
    """Submit the experiment in `file`. `env`: names of environment variables of this process that the job gets.

    Everything is checked before the job starts. Raises SpecErrors for an invalid experiment and RequestError if it
    can't run on the cluster.
    """
    experiment, _ = load(file)
    store = store.absolute()
    files = find_files(file, store)
    paths = local_paths(experiment, file.resolve().parent)
    is_shipped = {shipped.path for shipped in files}.issuperset(paths)
    # Relative paths refer to the experiment's folder: that of the package if it has them all, else the original one.
    target = f"{EXPERIMENT}/{file.name}" if is_shipped else str(file.resolve())
    checked = [] if is_shipped else [str(path) for path in (file.resolve(), *paths)]
    metadata = {"tunery": tunery.__version__, "experiment": experiment.name, "file": str(file.resolve())}
    metadata["store"] = str(store)
    with tempfile.TemporaryDirectory(prefix="tunery-package-") as folder:
        write_package(files, Path(folder))
        progress(f"checking the nodes of {api.address}")
        nodes = probe_nodes(api, Path(folder), experiment.name, store, checked)
        check_nodes(nodes, str(store))
        compute, _ = resolve_compute(experiment.compute, cluster_hardware(nodes, api.address), batch_sizes(experiment))
        note = check_placement(nodes, compute)
        job = _job_name(experiment.name)
        words = ["python", "-m", "tunery", "run", target, "--store", str(store)]
        api.submit(shlex.join(words), Path(folder), job, metadata, _environment(env))
    return Submission(job, api.address, str(store), files, tuple(filter(None, (note, *version_notes(nodes)))))


def resume(job: str, api: JobsApi) -> Submission:
    """Start an ended job of `submit` again: its command, code and store, on the cluster that still has its package.

    Raises RequestError if it has not ended, or is not a job of tunery.
    """
    info = api.info(job)
    metadata = info.metadata or {}
    if "tunery" not in metadata:
        raise RequestError(f"{job} is not a job of tunery", cause=f"its command is `{info.entrypoint}`")
    if info.status not in ENDED:
        raise RequestError(f"{job} has not ended", cause=f"its status is {info.status.lower()}", remedy="stop it first")
    name = _job_name(metadata["experiment"])
    try:
        api.restart(info, name)
    except TuneryError as error:
        raise TuneryError(
            f"{job} could not be started again",
            cause=error.cause,
            remedy=f"submit the file again: `tunery submit {metadata['file']} --store {metadata['store']}`",
        ) from error
    return Submission(name, api.address, metadata["store"], ())


def local_paths(experiment: Experiment, folder: Path) -> list[Path]:
    """Return the files and folders of a file system that the experiment reads. For a pattern it is the folder that the
    pattern is searched in. `folder`: that of the experiment file."""
    paths: dict[Path, None] = {}
    for stage in experiment.stages.values():
        if isinstance(stage, Dataset):
            for source in sources_of(stage):
                if not source.startswith((*REMOTE, "builtin:", PREFIX)):
                    paths[_without_pattern(folder / Path(source).expanduser())] = None
        if isinstance(stage, Review):
            decisions = folder / Path(stage.decisions).expanduser()
            paths[decisions if decisions.exists() else decisions.parent] = None
        for model in pretrained_models(stage):
            if model.is_folder:
                paths[model_folder(model, folder)] = None
        for reference in stage.model_refs():
            if isinstance(reference.model, PythonReward):
                paths[folder / reference.model.python] = None
    return [path.resolve() for path in paths]


def _without_pattern(path: Path) -> Path:
    while any(character in path.name for character in "*?[") and not path.exists():
        path = path.parent
    return path


def probe_nodes(api: JobsApi, package: Path, name: str, store: Path, paths: Sequence[str]) -> list[NodeReport]:
    """Run probe.py on the cluster and return the reports of its nodes. Raises TuneryError if it fails."""
    job = _job_name(f"{name}-preflight")
    request = json.dumps({"store": str(store), "paths": list(paths)})
    api.submit(shlex.join(["python", "-m", "tunery.jobs.probe", request]), package, job, {}, {})
    end = time.monotonic() + PROBE_SECONDS
    try:
        while (info := api.info(job)).status not in ENDED and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    except BaseException:  # Ctrl-C too: the probe must not stay on the cluster
        api.stop(job)
        raise
    if info.status not in ENDED:
        api.stop(job)
    logs = api.logs(job)
    found = re.search(re.escape(REPORT_PREFIX) + r"(\[.*\])$", logs, re.MULTILINE)
    if info.status != "SUCCEEDED" or found is None:
        lines = [line for line in logs.splitlines() if line.strip()]
        raise TuneryError(
            f"the cluster at {api.address} could not run tunery",
            cause=lines[-1] if lines else info.message or f"the job {job} is {info.status.lower()}",
            remedy=f"see `tunery logs {job}`; every node needs tunery's packages (constraints.txt)",
        )
    return [NodeReport.from_json(report) for report in json.loads(found[1])]


def follow(job: str, api: JobsApi) -> Iterator[str]:
    """Yield the output of a job as it is written, until it has ended. The API returns the complete output each time, so
    the interval grows to MAX_POLL_SECONDS."""
    length, seconds = 0, POLL_SECONDS
    while True:
        status = api.info(job).status
        text = api.logs(job)
        if len(text) > length:
            yield text[length:]
            length = len(text)
        if status in ENDED:
            return
        time.sleep(seconds)
        seconds = min(MAX_POLL_SECONDS, 1.02 * seconds)


def _job_name(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"


def _environment(names: Sequence[str]) -> dict[str, str]:
    if missing := [name for name in names if name not in os.environ]:
        raise RequestError(f"the environment variable {missing[0]} is not set", remedy="set it, or leave out --env")
    return {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        "COLUMNS": str(os.environ.get("COLUMNS", "") or 120),
        **{name: os.environ[name] for name in names},
    }

"""Tables and texts of the commands `submit`, `jobs` and `status`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from tunery.events.formatting import duration
from tunery.jobs.submit import Submission

LOG_LINES = 15
"""Number of lines of output that `status` shows."""


def submission_lines(submission: Submission) -> list[str]:
    """Return what was shipped, notes, and the commands that follow and stop the job."""
    lines = []
    if submission.files:
        count = Counter(file.destination.parts[0] for file in submission.files)
        size = sum(file.size for file in submission.files)
        own = [str(file.destination) for file in submission.files if file.destination.parts[0] != "tunery"]
        lines.append(f"shipped {len(submission.files)} files ({size / 1e6:.1f} MB): {count['tunery']} of tunery,")
        lines += [f"  {path}" for path in own]
    lines += [f"note: {note}" for note in submission.notes]
    lines.append(f"job {submission.job} on {submission.address}, store {submission.store}")
    return lines


def job_json(job: Any) -> dict[str, Any]:
    """Return the fields of a job that a user needs. `job`: `ray.job_submission.JobDetails`."""
    metadata = job.metadata or {}
    return {
        "job": job.submission_id,
        "experiment": metadata.get("experiment", ""),
        "status": str(job.status).lower(),
        "started": (job.start_time or 0) / 1000 or None,
        "seconds": _seconds(job),
        "file": metadata.get("file", ""),
        "store": metadata.get("store", ""),
        "message": job.message or "",
    }


def jobs_table(jobs: Sequence[Any]) -> RenderableType:
    """Return a table of jobs of tunery, in the given order."""
    table = Table("job", "experiment", "status", "started", "time", box=None, pad_edge=False)
    for values in map(job_json, jobs):
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(values["started"])) if values["started"] else ""
        seconds = duration(values["seconds"]) if values["seconds"] is not None else ""
        table.add_row(values["job"], values["experiment"], values["status"], started, seconds)
    return table


def status_lines(job: Any, logs: str) -> list[str]:
    """Return the status of a job, and the last lines of its output `logs`."""
    values = job_json(job)
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(values["started"])) if values["started"] else "not yet"
    lines = [f"{values['job']}: {values['status']}, started {started}"]
    if values["seconds"] is not None:
        lines[0] += f", {duration(values['seconds'])}"
    if values["file"]:
        lines += [f"file:  {values['file']}", f"store: {values['store']}"]
    if values["message"]:
        lines.append(f"message: {' '.join(values['message'].split())[:500]}")
    return [*lines, "", *[line for line in logs.splitlines() if line.strip()][-LOG_LINES:]]


def _seconds(job: Any) -> float | None:
    if not job.start_time:
        return None
    end: float = job.end_time or time.time() * 1000
    return (end - float(job.start_time)) / 1000

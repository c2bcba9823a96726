"""Connection to the Jobs API of a Ray cluster (https://docs.ray.io/en/latest/cluster/running-applications/job-submission).

The API runs code, so an address that other machines can reach must require a token, unless the user accepts the risk.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tunery.errors import RequestError, TuneryError

T = TypeVar("T")
VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Environment variable of Ray with the default address."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_SECONDS = 15.0
"""Time limit for the first response of the API."""


def jobs_address(address: str | None, *, insecure: bool = False) -> str:
    """Return the URL of the Jobs API: `address`, or RAY_API_SERVER_ADDRESS, or that of a cluster on this machine.

    Raises RequestError if it is the address of another service of Ray, or if other machines can reach it without a
    token and `insecure` is False.
    """
    given = address or os.environ.get(VARIABLE, "").strip() or DEFAULT_ADDRESS
    url = urlsplit(given if "://" in given else f"//{given}")
    host = url.hostname or ""
    if url.scheme not in ("http", "https") or not host:
        cause = "it is the address of Ray Client" if url.scheme == "ray" else "it has no `http://`"
        raise RequestError(
            f"{given} is not the address of a Ray cluster's Jobs API",
            cause=cause,
            remedy=f"give the address of its dashboard, such as http://{host or 'HOST'}:8265",
        )
    if not insecure and not has_token() and not is_loopback(host):
        raise RequestError(
            f"{given} accepts jobs from the network without a token",
            cause="RAY_AUTH_MODE is not `token`, or there is no token: whoever reaches the address can run code there",
            remedy="start the cluster with RAY_AUTH_MODE=token, and set it and RAY_AUTH_TOKEN_PATH here; "
            "forward the port (`ssh -L 8265:127.0.0.1:8265 HOST`) and use http://127.0.0.1:8265; or accept the risk "
            "with --insecure",
        )
    return given.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host name or IP address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def has_token() -> bool:
    """Whether Ray (2.60) will send a token: RAY_AUTH_MODE=token, with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or the
    default token file."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return False
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "") or Path.home() / ".ray" / "auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()


class JobsApi:
    """Client of the Jobs API whose errors are TuneryErrors."""

    def __init__(self, address: str) -> None:
        """`address`: as returned by `jobs_address`. Raises TuneryError if no cluster answers there."""
        self.address = address
        # The variables would replace the address (ray/dashboard/utils.py, 2.60).
        os.environ.pop("RAY_ADDRESS", None)
        os.environ[VARIABLE] = address
        self._check_connection()
        from ray._private.runtime_env import packaging
        from ray.dashboard.modules import dashboard_sdk
        from ray.job_submission import JobSubmissionClient

        for module in (packaging, dashboard_sdk):  # they log each upload to the terminal
            logging.getLogger(module.__name__).setLevel(logging.WARNING)

        self._client = self.call(lambda: JobSubmissionClient(address))

    def call(self, request: Callable[[], T]) -> T:
        """Return `request()`. Its errors are raised as TuneryErrors."""
        try:
            return request()
        except TuneryError:
            raise
        except Exception as error:  # requests, aiohttp, ray.exceptions and RuntimeError
            raise TuneryError(
                f"the request to the cluster at {self.address} failed",
                cause=" ".join(str(error).split())[:500] or type(error).__name__,
            ) from error

    def submit(self, entrypoint: str, folder: Path, job: str, metadata: dict[str, str], env: dict[str, str]) -> None:
        """Upload `folder` and start `entrypoint` (a shell command) in a copy of it on the cluster's head node. `job`:
        name of the new job. `env`: environment variables of all its processes."""
        runtime_env = {"working_dir": str(folder), "env_vars": env, "excludes": []}
        self.call(
            lambda: self._client.submit_job(
                entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env, metadata=metadata
            )
        )

    def restart(self, info: Any, job: str) -> None:
        """Start the command of another job again, with its package, as `job`. `info`: details of the other job."""
        self.call(
            lambda: self._client.submit_job(
                entrypoint=info.entrypoint, submission_id=job, runtime_env=info.runtime_env, metadata=info.metadata
            )
        )

    def jobs(self) -> list[Any]:
        """Return the details of all submitted jobs, newest first (`ray.job_submission.JobDetails`)."""
        details = self.call(self._client.list_jobs)
        return sorted((job for job in details if job.submission_id), key=lambda job: job.start_time or 0, reverse=True)

    def info(self, job: str) -> Any:
        """Return the details of a job (`ray.job_submission.JobDetails`)."""
        return self.call(lambda: self._client.get_job_info(job))

    def logs(self, job: str) -> str:
        """Return the output of a job's driver so far."""
        return str(self.call(lambda: self._client.get_job_logs(job)))

    def stop(self, job: str) -> None:
        """Ask the driver of a job to stop: SIGTERM, and SIGKILL when it does not end."""
        self.call(lambda: self._client.stop_job(job))

    def _check_connection(self) -> None:
        import requests
        from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

        remedy = (
            f"start a cluster (`ray start --head`, cluster/local.sh) or give its address with --address or {VARIABLE}"
        )
        try:
            response = requests.get(
                f"{self.address}/api/version", timeout=CONNECT_SECONDS, headers=get_auth_headers_if_auth_enabled({})
            )
        except requests.RequestException as error:
            raise TuneryError(
                f"no Ray cluster answers at {self.address}", cause=_reason(error), remedy=remedy
            ) from error
        if response.status_code in (401, 403):
            raise RequestError(
                f"the cluster at {self.address} did not accept the token",
                cause=f"HTTP status {response.status_code}",
                remedy="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, to the cluster's token",
            )
        if not response.ok:
            raise TuneryError(
                f"the server at {self.address} is not the dashboard of a Ray cluster",
                cause=f"HTTP status {response.status_code} for /api/version",
                remedy=remedy,
            )


def _reason(error: Exception) -> str:
    """Return the innermost reason of an error of `requests`, without its nested representations."""
    text = str(error)
    for words in ("Connection refused", "Name or service not known", "No route to host", "timed out"):
        if words in text:
            return words.lower()
    return " ".join(text.split())[:200]

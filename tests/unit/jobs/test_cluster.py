"""Addresses of the Jobs API: wrong services and open clusters are refused before anything is sent."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunery.errors import RequestError, TuneryError
from tunery.jobs.cluster import DEFAULT_ADDRESS, JobsApi, has_token, jobs_address


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "http://localhost:8265/", "http://[::1]:8265"])
def test_loopback_needs_no_token(address: str) -> None:
    assert jobs_address(address) == address.rstrip("/")


def test_default_is_the_variable_of_ray_or_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs_address(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9000")
    assert jobs_address(None) == "http://127.0.0.1:9000"


@pytest.mark.parametrize(
    ("address", "cause"),
    [
        ("ray://head:10001", "Ray Client"),
        ("head:6379", "no `http://`"),
        ("auto", "no `http://`"),
        ("s3://x", "no `http"),
    ],
)
def test_other_addresses_are_refused_with_the_right_form(address: str, cause: str) -> None:
    with pytest.raises(RequestError, match="is not the address of a Ray cluster's Jobs API") as refused:
        jobs_address(address)
    assert cause in refused.value.cause
    assert ":8265" in refused.value.remedy


def test_address_in_the_network_needs_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = "http://gpu-head:8265"
    with pytest.raises(RequestError, match="accepts jobs from the network without a token") as refused:
        jobs_address(address)
    assert "--insecure" in refused.value.remedy
    assert jobs_address(address, insecure=True) == address
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert not has_token()
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert jobs_address(address) == address


def test_closed_port_is_reported() -> None:
    with pytest.raises(TuneryError, match=r"no Ray cluster answers at http://127\.0\.0\.1:9") as failed:
        JobsApi("http://127.0.0.1:9")
    assert failed.value.cause == "connection refused"


@pytest.fixture
def web_server() -> Iterator[str]:
    """A server that is not Ray's dashboard: it has no page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_other_server_is_reported(web_server: str) -> None:
    with pytest.raises(TuneryError, match="is not the dashboard of a Ray cluster") as failed:
        JobsApi(web_server)
    assert "404" in failed.value.cause

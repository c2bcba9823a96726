"""RAY_ADDRESS: an invalid address is rejected before anything starts, an unreachable one is reported within seconds."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunery.errors import RequestError, TuneryError
from tunery.events.event_log import EventLog, read_events
from tunery.pipeline import ray_address
from tunery.pipeline.ray_address import check_reachable, cluster_address, connection_failed
from tunery.pipeline.ray_session import RaySession
from tunery.spec import Compute


@pytest.mark.parametrize("address", ["", " ", "local"])
def test_ray_is_started_locally_without_an_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() is None


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.local:6380", "[::1]:6379"])
def test_head_address_is_accepted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() == address


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://head:8265", ["`tunery submit FILE --address` uses it", "RAY_ADDRESS=head:6379", "as a Ray driver"]),
        ("https://head:8265/", ["`tunery submit FILE --address` uses it", "RAY_ADDRESS=head:6379"]),
        ("ray://head:10001", ["Ray Client", "RAY_ADDRESS=head:6379"]),
        ("tcp://head:6379", ["`tcp://`", "RAY_ADDRESS=head:6379"]),
        ("head", ["it has no port", "RAY_ADDRESS=head:6379"]),
        ("head:x", ["its port is `x`", "RAY_ADDRESS=head:6379"]),
        ("head:70000", ["its port is `70000`"]),
        (":6379", ["it has no host", "RAY_ADDRESS=HOST:6379"]),
    ],
)
def test_invalid_address_is_rejected_with_a_valid_one(
    address: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RequestError) as caught:
        cluster_address()
    assert address in caught.value.message
    for part in [*expected, "unset RAY_ADDRESS"]:
        assert part in str(caught.value)


@pytest.fixture
def http_port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def unreachable(address: str) -> TuneryError:
    """Return the error that the check raises, within ten seconds."""
    begin = time.monotonic()
    with pytest.raises(TuneryError) as caught:
        check_reachable(address)
    assert time.monotonic() - begin < 10
    assert f"RAY_ADDRESS={address}" in caught.value.message
    assert "unset RAY_ADDRESS" in caught.value.remedy
    return caught.value


def test_closed_port_fails_immediately() -> None:
    assert "no server listens at this address" in unreachable(f"127.0.0.1:{free_port()}").cause


def test_unknown_host_name_is_reported() -> None:
    assert "`no-such-host.invalid` can't be resolved" in unreachable("no-such-host.invalid:6379").cause


def test_http_server_is_not_mistaken_for_a_head(http_port: int) -> None:
    error = unreachable(f"127.0.0.1:{http_port}")
    assert "not the head of a Ray cluster" in error.cause
    assert "8265" in error.remedy


def test_silent_server_is_not_mistaken_for_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "RESPONSE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "not the head" in unreachable(f"127.0.0.1:{silent.getsockname()[1]}").cause


def test_unresponsive_host_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener with a full queue drops packets, like an unreachable host."""
    monkeypatch.setattr(ray_address, "CONNECT_SECONDS", 1.0)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        clients = [socket.socket() for _ in range(8)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        try:
            assert "did not answer within 1 s" in unreachable(f"127.0.0.1:{full.getsockname()[1]}").cause
        finally:
            for client in clients:
                client.close()


def test_grpc_server_is_accepted_as_head() -> None:
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        check_reachable(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_session_logs_that_it_connects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    session = RaySession(EventLog(tmp_path / "events" / "driver.jsonl"), tmp_path)
    with pytest.raises(TuneryError, match="no Ray cluster can be reached"):
        session.start(Compute())
    (result,) = read_events(tmp_path / "events")
    assert (result["event"], result["address"], result["limit"]) == ("ray_connecting", address, 30.0)
    session.stop()


def test_cause_has_the_complete_message_of_ray() -> None:
    error = connection_failed("auto", ConnectionError("Could not find any running Ray instance.\nPlease specify it."))
    assert error.cause == "Could not find any running Ray instance.; Please specify it."
    assert "ray start --head" in error.remedy


def test_cause_is_the_handled_error_without_its_traceback() -> None:
    error = ConnectionError("Failed to connect to Ray cluster at head:6379")
    error.__cause__ = RuntimeError(
        'Failed on error: Traceback (most recent call last):\n  File "node.py", line 996, in init\n    client = x()\n'
        "             ^^^\nray.exceptions.AuthenticationError: the token is not that of the cluster"
    )
    cause = connection_failed("head:6379", error).cause
    assert cause == (
        "Failed to connect to Ray cluster at head:6379; AuthenticationError: the token is not that of the cluster"
    )

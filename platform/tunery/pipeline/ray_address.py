"""Validate RAY_ADDRESS and check that a Ray cluster is reachable there.

The errors of Ray (2.60) are not sufficient: if nothing listens at the address, `ray.init` retries silently for 14
minutes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from tunery.errors import RequestError, TuneryError
from tunery.pipeline.diagnose import raised_in

VARIABLE = "RAY_ADDRESS"
CONNECT_SECONDS = 30.0
"""Time limit from the first packet to a connected driver."""
RESPONSE_SECONDS = 5.0
"""Time limit for the first bytes of a server that has accepted a connection."""
DEFAULT_PORT = 6379
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""Connection preface of a client with an empty SETTINGS frame (RFC 9113, section 3.4). The head of a Ray cluster speaks
gRPC, and a gRPC server answers with a SETTINGS frame."""
SETTINGS_FRAME = 4
DASHBOARD = "it is the address of the dashboard, which accepts jobs: `tunery submit FILE --address` uses it"
SCHEMES = {
    "http": DASHBOARD,
    "https": DASHBOARD,
    "ray": "it is the address of Ray Client, which Ray Train does not support",
}
"""Cause of the error for an address with a scheme."""
UNSET = f"or unset {VARIABLE} to start Ray on this machine"


def cluster_address() -> str | None:
    """Return RAY_ADDRESS as HOST:PORT or `auto`; None if Ray is to be started on this machine. Does not connect.

    Raises RequestError if it is not the address of the head of a cluster.
    """
    address = os.environ.get(VARIABLE, "").strip()
    if address in ("", "local"):
        return None
    if address == "auto":
        return address
    scheme, separator, rest = address.rpartition("://")
    host, port = _host_and_port(rest)
    if separator:
        raise RequestError(
            f"{VARIABLE}={address} is not the address of a Ray cluster's head",
            cause=SCHEMES.get(scheme, f"Ray has no scheme `{scheme}://`"),
            remedy=f"tunery connects as a Ray driver, on a machine of the cluster: set {VARIABLE}="
            f"{host or 'HOST'}:{DEFAULT_PORT}, {UNSET}",
        )
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise RequestError(
            f"{VARIABLE}={address} is not an address of the form HOST:PORT",
            cause="it has no port" if host and not port else f"its port is `{port}`" if host else "it has no host",
            remedy=f"set {VARIABLE}={host or 'HOST'}:{DEFAULT_PORT}, the port of `ray start --head`, {UNSET}",
        )
    return address


def check_reachable(address: str, wait: Callable[[float], None] = time.sleep) -> None:
    """Raise TuneryError unless a gRPC server answers at `address` (HOST:PORT) within CONNECT_SECONDS.

    A host that does not answer is retried until then; a closed port or an unknown host name fails immediately. `wait`
    is called with seconds between attempts.
    """
    host, port = _host_and_port(address)
    end = time.monotonic() + CONNECT_SECONDS
    remedy = f"start the cluster (`ray start --head`), correct {VARIABLE}, {UNSET}"
    try:
        socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise _unreachable(address, f"the host name `{host}` can't be resolved ({error.strerror})", remedy) from None
    while True:
        try:
            # Short attempts, so that an interrupt is handled soon.
            connection = socket.create_connection((host, int(port)), timeout=2.0)
            break
        except TimeoutError:
            if time.monotonic() >= end:
                cause = f"the host `{host}` did not answer within {CONNECT_SECONDS:.0f} s"
                raise _unreachable(address, cause, remedy) from None
            wait(0.1)
        except OSError as error:
            raise _unreachable(
                address, f"{error.strerror or error}: no server listens at this address", remedy
            ) from None
    with connection:
        if not _tls() and not _speaks_grpc(connection):
            raise _unreachable(
                address,
                "the server at this address is not the head of a Ray cluster, which speaks gRPC",
                f"use the port of the head, {DEFAULT_PORT} unless `ray start --head` was given another one, not that "
                f"of the dashboard (8265) or of Ray Client (10001), {UNSET}",
            )


def connection_failed(address: str, error: Exception | None) -> TuneryError:
    """Return the error for a `ray.init` that failed with `error`, or timed out (None)."""
    if error is None:
        cause = f"its head is reachable, but did not accept this driver within {CONNECT_SECONDS:.0f} s"
    else:
        # The message of Ray only says that it failed; the reason is in the chained exception.
        links = [link for link in (error, error.__cause__ or error.__context__) if link is not None]
        texts = [raised_in(str(link)) or str(link) for link in links]  # some contain the traceback of another error
        lines = dict.fromkeys(line.strip() for text in texts for line in text.splitlines() if line.strip())
        cause = "; ".join(lines)[:500] or type(error).__name__
    return _unreachable(
        address,
        cause,
        "the cluster must have this machine's versions of Ray and Python, a Ray node on this machine, and its token "
        f"(RAY_AUTH_MODE=token and RAY_AUTH_TOKEN) if it requires one; correct that, {UNSET}"
        if address != "auto"
        else f"start one with `ray start --head`, give its HOST:PORT as {VARIABLE}, {UNSET}",
    )


def _unreachable(address: str, cause: str, remedy: str) -> TuneryError:
    return TuneryError(f"no Ray cluster can be reached at {VARIABLE}={address}", cause=cause, remedy=remedy)


def _host_and_port(text: str) -> tuple[str, str]:
    """Split HOST:PORT or [IPv6]:PORT; the port is "" if there is none."""
    text = text.split("/")[0]
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        return host, port.removeprefix(":")
    host, _, port = text.partition(":")
    return host, port


def _tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _speaks_grpc(connection: socket.socket) -> bool:
    connection.settimeout(RESPONSE_SECONDS)
    try:
        connection.sendall(HTTP2_PREFACE)
        header = b""
        while len(header) < 9 and (more := connection.recv(9 - len(header))):
            header += more
    except OSError:
        return False
    return len(header) == 9 and header[3] == SETTINGS_FRAME

"""Local web server for the review page: http.server on 127.0.0.1, without external resources.

A request must contain the random token at the start of its path (unknown to other users of the machine), a Host header
that names this machine (against DNS rebinding), and, if the browser sends an Origin header, the origin of this page.
The token is in the path instead of a cookie, because cookies of 127.0.0.1 are shared by all ports. Rows are untrusted
text: they are sent as JSON and inserted into the page as text, never as HTML, and the content security policy allows
no script except page.js.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from tunery.errors import RequestError
from tunery.review.decisions import DECISIONS
from tunery.review.review_session import ReviewSession, UnknownRow

HOSTS = frozenset({"127.0.0.1", "localhost"})
MAX_BODY_BYTES = 4096
FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ReviewServer(ThreadingHTTPServer):
    """Serves one session. `port` 0 selects a free port; raises RequestError if the port is in use."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    """Python's default of 5 causes ECONNRESET when many tabs reload at once."""

    def __init__(self, session: ReviewSession, port: int = 0) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise RequestError(
                f"port {port} of 127.0.0.1 can't be used", cause=str(error), remedy="give another --port, or none"
            ) from None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # the browser closed the connection
            super().handle_error(request, client_address)


class _HttpError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tunery", ""
    timeout = 60
    """Seconds after which an idle connection is closed."""

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Suppress the request log, so that the address stays visible in the terminal."""

    def _respond(self, handle: Callable[[list[str]], tuple[str, bytes]]) -> None:
        try:
            status = HTTPStatus.OK
            content_type, body = handle(self._path())
        except _HttpError as http_error:
            status, content_type, body = _error_response(http_error.status, http_error.message)
        except UnknownRow as id:
            status, content_type, body = _error_response(HTTPStatus.NOT_FOUND, f"there is no row {id} in this sample")
        except OSError as error:
            status, content_type, body = _error_response(HTTPStatus.INSUFFICIENT_STORAGE, f"not saved: {error}")
        if status != HTTPStatus.OK:
            self.close_connection = True  # the rest of a rejected request is not read
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": content_type, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _path(self) -> list[str]:
        """Validate the Host header and the token, and return the parts of the path after the token."""
        if _split_url(f"//{self.headers.get('Host', '')}").hostname not in HOSTS:
            raise _HttpError(HTTPStatus.FORBIDDEN, "this page is only available on this machine")
        parts = _split_url(self.path).path.split("/")[1:]
        if not hmac.compare_digest(parts[0].encode() if parts else b"", self.server.token.encode()):
            raise _HttpError(
                HTTPStatus.FORBIDDEN, "the address has no valid token: open the address shown in the terminal"
            )
        if len(parts) == 1:
            raise _HttpError(HTTPStatus.NOT_FOUND, "add a / at the end of the address")
        return [unquote(part) for part in parts[1:]]

    def _get(self, path: list[str]) -> tuple[str, bytes]:
        match path:
            case [name] if name in FILES:
                file, content_type = FILES[name]
                return content_type, resources.files("tunery.review").joinpath(file).read_bytes()
            case ["state"]:
                return _as_json(self.server.session.state())
            case ["rows", id]:
                return _as_json(self.server.session.row(id))
        raise _HttpError(HTTPStatus.NOT_FOUND, "not found")

    def _post(self, path: list[str]) -> tuple[str, bytes]:
        origin = self.headers.get("Origin")
        if origin is not None and _split_url(origin).netloc != self.headers.get("Host"):
            raise _HttpError(HTTPStatus.FORBIDDEN, "requests from other pages are rejected")
        body = self._body()
        match path:
            case ["decide"]:
                id, decision = body.get("id"), body.get("decision")
                if not isinstance(id, str) or decision not in DECISIONS:
                    raise _HttpError(HTTPStatus.BAD_REQUEST, "a decision is an id with keep or drop")
                return _as_json(self.server.session.decide(id, decision))
            case ["undo"]:
                return _as_json(self.server.session.undo())
        raise _HttpError(HTTPStatus.NOT_FOUND, "not found")

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":  # a cross-site form can't send this type
            raise _HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            raise _HttpError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"send at most {MAX_BODY_BYTES} bytes, with a Content-Length header",
            )
        try:
            body = json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise _HttpError(HTTPStatus.BAD_REQUEST, "the body is not valid JSON") from None
        if not isinstance(body, dict):
            raise _HttpError(HTTPStatus.BAD_REQUEST, "the body is not a JSON object")
        return body


def _split_url(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # such as `Host: [`
        raise _HttpError(HTTPStatus.BAD_REQUEST, "the address or the Host header is not valid") from None


def _as_json(value: dict[str, Any]) -> tuple[str, bytes]:
    return "application/json; charset=utf-8", json.dumps(value, allow_nan=False).encode()


def _error_response(status: HTTPStatus, message: str) -> tuple[HTTPStatus, str, bytes]:
    return status, "text/plain; charset=utf-8", message.encode(errors="backslashreplace")

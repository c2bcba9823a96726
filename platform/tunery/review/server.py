"""The review as a page of this machine alone: http.server on 127.0.0.1, no resource from anywhere else.

Who may speak to it: whoever knows the random token that begins every path (another user of the machine doesn't), with
a Host that names this machine (so that no web site can rebind its own name to 127.0.0.1) and, where a browser says
which page a request comes from, from this page. The token is in the path, not in a cookie: cookies of 127.0.0.1 are
shared by all its ports. Rows are hostile text: they travel as JSON and are put into the page as text, never as HTML,
and the content security policy lets no script run but page.js.
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
from urllib.parse import unquote, urlsplit

from tunery.errors import RequestError
from tunery.review.decisions import DECISIONS
from tunery.review.review_session import ReviewSession, UnknownRow

HOSTS = frozenset({"127.0.0.1", "localhost"})
LONGEST_BODY = 4096
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
    """Serves one session. Raises RequestError when the port is taken; `port` 0 takes a free one."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    """Python's 5 refuses connections (ECONNRESET) when many tabs reload at once."""

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
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a browser that hung up is no error
            super().handle_error(request, client_address)


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tunery", ""
    timeout = 60
    """Seconds that an idle connection is kept."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal shows the address, which nobody should have to scroll back for."""

    def _answer(self, work: Callable[[list[str]], tuple[str, bytes]]) -> None:
        try:
            status = HTTPStatus.OK
            kind, body = work(self._path())
        except _Refused as refused:
            status, kind, body = _refusal(refused.status, refused.message)
        except UnknownRow as unknown:
            status, kind, body = _refusal(HTTPStatus.NOT_FOUND, f"there is no row {unknown} in this sample")
        except OSError as error:
            status, kind, body = _refusal(HTTPStatus.INSUFFICIENT_STORAGE, f"not saved: {error}")
        if status != HTTPStatus.OK:
            self.close_connection = True  # what a refused request still wanted to send is not read
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _path(self) -> list[str]:
        """The parts of the path after the token, once everything about the request is as it should be."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in HOSTS:
            raise _Refused(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
        parts = urlsplit(self.path).path.split("/")[1:]
        if not hmac.compare_digest(parts[0].encode() if parts else b"", self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "the address lacks its token: open the one that the terminal shows")
        if len(parts) == 1:
            raise _Refused(HTTPStatus.NOT_FOUND, "the address ends in /")
        return [unquote(part) for part in parts[1:]]

    def _get(self, path: list[str]) -> tuple[str, bytes]:
        match path:
            case [name] if name in FILES:
                file, kind = FILES[name]
                return kind, resources.files("tunery.review").joinpath(file).read_bytes()
            case ["state"]:
                return _as_json(self.server.session.state())
            case ["rows", id]:
                return _as_json(self.server.session.row(id))
        raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self, path: list[str]) -> tuple[str, bytes]:
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise _Refused(HTTPStatus.FORBIDDEN, "another page may not decide")
        said = self._body()
        match path:
            case ["decide"]:
                id, decision = said.get("id"), said.get("decision")
                if not isinstance(id, str) or decision not in DECISIONS:
                    raise _Refused(HTTPStatus.BAD_REQUEST, "a decision is an id with keep or drop")
                return _as_json(self.server.session.decide(id, decision))
            case ["undo"]:
                return _as_json(self.server.session.undo())
        raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":  # a plain form of another site can't send it
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {LONGEST_BODY} bytes, and say how many")
        try:
            said = json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise _Refused(HTTPStatus.BAD_REQUEST, "this is no JSON") from None
        if not isinstance(said, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "send an object")
        return said


def _as_json(value: dict[str, Any]) -> tuple[str, bytes]:
    return "application/json; charset=utf-8", json.dumps(value, allow_nan=False).encode()


def _refusal(status: HTTPStatus, message: str) -> tuple[HTTPStatus, str, bytes]:
    return status, "text/plain; charset=utf-8", message.encode(errors="backslashreplace")

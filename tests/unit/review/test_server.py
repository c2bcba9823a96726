"""The review server over real HTTP: access control, responses, and saved decisions."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunery.errors import RequestError
from tunery.review.decisions import DecisionLog, read_decisions
from tunery.review.review_items import ReviewItem, RowOutcome
from tunery.review.review_session import ReviewSession
from tunery.review.server import ReviewServer

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u202e \x1b[31m " + "x" * 50_000


def item(id: str, text: str = "t") -> ReviewItem:
    row = {"id": id, "text": text, "messages": None, "rejected": None}
    return ReviewItem(
        id, row, RowOutcome(id != "b", {"perplexity": float("nan") if id == "c" else 2.5}, {"perplexity": 3.0})
    )


ROWS = [item("a", HOSTILE), item("b"), item("c"), *(item(f"{n:016x}") for n in range(40))]


@dataclass
class HttpResponse:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    server: ReviewServer
    path: Path

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> HttpResponse:
        connection = http.client.HTTPConnection(*self.server.server_address[:2], timeout=10)
        try:
            content_type = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, None if body is None else json.dumps(body), {**content_type, **headers})
            response = connection.getresponse()
            return HttpResponse(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def get(self, path: str = "", **headers: str) -> HttpResponse:
        return self.request("GET", f"/{self.server.token}/{path}", **headers)

    def post(self, path: str, body: Any, **headers: str) -> HttpResponse:
        return self.request("POST", f"/{self.server.token}/{path}", body, **headers)

    def decide(self, id: str, decision: str) -> HttpResponse:
        return self.post("decide", {"id": id, "decision": decision})


def serve(path: Path, *, show_filter: bool = False) -> Iterator[Client]:
    log = DecisionLog(path)
    session = ReviewSession("checked", ROWS, log, next_command="tunery run x.yaml", show_filter=show_filter)
    with ReviewServer(session) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Client(server, path)
        finally:
            server.shutdown()
            thread.join()
            log.close()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    yield from serve(tmp_path / "d.jsonl")


# Access.


def test_server_listens_on_localhost_only(client: Client) -> None:
    assert client.server.server_address[0] == "127.0.0.1"
    assert client.server.url.startswith(f"http://127.0.0.1:{client.server.server_address[1]}/")
    assert len(client.server.token) >= 32


@pytest.mark.parametrize("path", ["/", "/x/", "/state", "/%(token)sx/state", "/x/%(token)s/", ""])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_request_without_the_token_is_rejected(method: str, path: str, client: Client) -> None:
    response = client.request(method, path % {"token": client.server.token}, {} if method == "POST" else None)
    assert response.status == 403
    assert client.server.token.encode() not in response.body
    assert b"checked" not in response.body


def test_tokens_differ_from_server_to_server(client: Client, tmp_path: Path) -> None:
    for other in serve(tmp_path / "other.jsonl"):
        assert other.server.token != client.server.token


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1]", "0.0.0.0"])
def test_rebound_host_name_is_rejected(host: str, client: Client) -> None:
    assert client.get("state", Host=host).status == 403
    assert client.post("decide", {"id": "a", "decision": "keep"}, Host=host).status == 403
    assert read_decisions(client.path) == {}


@pytest.mark.parametrize("headers", [{"Host": "["}, {"Host": "localhost", "Origin": "http://["}])
def test_invalid_address_in_a_header_is_rejected(headers: dict[str, str], client: Client) -> None:
    assert client.post("decide", {"id": "a", "decision": "keep"}, **headers).status == 400
    assert read_decisions(client.path) == {}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999"])
def test_tunnel_from_another_port_is_accepted(host: str, client: Client) -> None:
    assert client.get("state", Host=host).status == 200


def test_page_of_another_site_cannot_decide(client: Client) -> None:
    body = {"id": "a", "decision": "keep"}
    assert client.post("decide", body, Origin="http://evil.example").status == 403
    assert client.post("decide", body, Origin="null").status == 403
    assert client.post("decide", body, **{"Content-Type": "text/plain"}).status == 415
    assert read_decisions(client.path) == {}
    address = client.server.url.split("/")[2]
    assert client.post("decide", body, Origin=f"http://{address}").status == 200


@pytest.mark.parametrize("path", ["", "page.css", "page.js", "state", "rows/a", "nothing"])
def test_every_response_forbids_foreign_scripts_frames_and_caching(path: str, client: Client) -> None:
    headers = client.get(path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer", "the token is in the address"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers
    assert "Python" not in headers["Server"]


def test_page_has_no_external_address(client: Client) -> None:
    for path in ("", "page.css", "page.js"):
        response = client.get(path)
        assert response.status == 200
        text = response.body.decode()
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML =" not in text
        assert "<script>" not in text, "the policy forbids inline scripts"


@pytest.mark.parametrize(
    "path", ["../decisions.py", "..%2fserver.py", "%2e%2e/server.py", "rows/", "rows/zzz", "rows/a/b", "x"]
)
def test_other_paths_are_not_found(path: str, client: Client) -> None:
    assert client.get(path).status == 404


# Content.


def test_row_is_sent_as_complete_json(client: Client) -> None:
    response = client.get("rows/a")
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert response.json == {"id": "a", "messages": [{"role": "text", "content": HOSTILE, "judged": True}]}


def test_filter_outcome_is_sent_for_decided_rows_only(client: Client) -> None:
    before = client.get("state").json
    assert before["filter"] == {}
    assert "perplexity" not in json.dumps(before) + client.get("rows/b").body.decode()
    after = client.decide("b", "keep").json
    score = {"name": "perplexity", "value": 2.5, "threshold": 3.0}
    assert after["filter"] == {"b": {"decision": "drop", "scores": [score]}}
    assert client.decide("c", "keep").json["filter"]["c"]["scores"][0]["value"] is None
    assert client.post("undo", {}).json["filter"].keys() == {"b"}


def test_filter_outcome_is_sent_for_all_rows_if_requested(tmp_path: Path) -> None:
    for client in serve(tmp_path / "d.jsonl", show_filter=True):
        assert client.get("state").json["filter"].keys() == {row.id for row in ROWS}


# Saving.


def test_decision_is_in_the_file_when_the_response_arrives(client: Client) -> None:
    assert client.decide("a", "keep").json["decided"] == {"a": "keep"}
    assert read_decisions(client.path) == {"a": "keep"}
    client.decide("a", "drop")
    assert read_decisions(client.path) == {"a": "drop"}
    assert client.post("undo", {}).json["undone"] == "a"
    assert read_decisions(client.path) == {"a": "keep"}
    assert client.post("undo", {}).json["decided"] == {}
    assert read_decisions(client.path) == {}
    assert client.post("undo", {}).json["undone"] is None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"id": "a", "decision": "perhaps"}, 400),
        ({"id": "a", "decision": None}, 400),
        ({"id": ["a"], "decision": "keep"}, 400),
        ({"id": "unknown", "decision": "keep"}, 404),
        ({}, 400),
        ([], 400),
        ({"id": "a" * 5000, "decision": "keep"}, 413),
    ],
)
def test_invalid_decision_changes_nothing(body: Any, status: int, client: Client) -> None:
    assert client.post("decide", body).status == status
    assert read_decisions(client.path) == {}
    assert client.get("state").status == 200


def test_body_without_json_or_length_is_rejected(client: Client) -> None:
    for head in (
        "Content-Length: 3\r\n\r\n{a}",
        "Content-Length: -1\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ):
        with socket.create_connection(client.server.server_address[:2], timeout=10) as connection:
            start = (
                f"POST /{client.server.token}/decide HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            connection.sendall((start + head).encode())
            assert connection.recv(100).split()[1] in (b"400", b"413")
    assert client.get("state").status == 200


def test_concurrent_tabs_lose_no_decision(client: Client) -> None:
    ids = [row.id for row in ROWS]
    jobs = [(id, "keep" if number % 2 else "drop") for number, id in enumerate(ids * 4)]
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda job: client.decide(*job), jobs))
    assert {response.status for response in responses} == {200}
    lines = [json.loads(line) for line in client.path.read_text().splitlines()]
    assert sorted((line["id"], line["decision"]) for line in lines) == sorted(jobs)
    assert read_decisions(client.path) == client.get("state").json["decided"]
    assert len(read_decisions(client.path)) == len(ids)


def test_decisions_survive_a_restart(tmp_path: Path) -> None:
    for client in serve(tmp_path / "d.jsonl"):
        client.decide("a", "keep")
        client.decide("b", "drop")
    for client in serve(tmp_path / "d.jsonl"):
        state = client.get("state").json
        assert state["decided"] == {"a": "keep", "b": "drop"}
        assert client.post("undo", {}).json["undone"] == "b"


def test_decision_on_a_row_of_another_sample_is_not_undone(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": "elsewhere", "decision": "keep"}\n')
    for client in serve(tmp_path / "d.jsonl"):
        state = client.get("state").json
        assert (state["undo"], state["decided"]) == (None, {})
        assert client.post("undo", {}).json["undone"] is None
    assert read_decisions(tmp_path / "d.jsonl") == {"elsewhere": "keep"}


def test_full_disk_is_reported_and_the_row_stays_undecided(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DecisionLog, line: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DecisionLog, "_append", fail)
    response = client.decide("a", "keep")
    assert (response.status, b"No space left" in response.body) == (507, True)
    monkeypatch.undo()
    assert client.get("state").json["decided"] == {}


def test_used_port_is_reported(client: Client) -> None:
    for port in (client.server.server_address[1], 70_000):
        with pytest.raises(RequestError, match=f"port {port} of 127.0.0.1 can't be used"):
            ReviewServer(client.server.session, port)

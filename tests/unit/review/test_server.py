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
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Site:
    server: ReviewServer
    path: Path

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(*self.server.server_address[:2], timeout=10)
        try:
            sent = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, None if body is None else json.dumps(body), {**sent, **headers})
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def get(self, path: str = "", **headers: str) -> Answer:
        return self.ask("GET", f"/{self.server.token}/{path}", **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", f"/{self.server.token}/{path}", body, **headers)

    def decide(self, id: str, decision: str) -> Answer:
        return self.post("decide", {"id": id, "decision": decision})


def serve(path: Path, *, show_filter: bool = False) -> Iterator[Site]:
    log = DecisionLog(path)
    session = ReviewSession("checked", ROWS, log, next_command="tunery run x.yaml", show_filter=show_filter)
    with ReviewServer(session) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Site(server, path)
        finally:
            server.shutdown()
            thread.join()
            log.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield from serve(tmp_path / "d.jsonl")


# Who may speak to it.


def test_it_listens_on_this_machine_alone(site: Site) -> None:
    assert site.server.server_address[0] == "127.0.0.1"
    assert site.server.url.startswith(f"http://127.0.0.1:{site.server.server_address[1]}/")
    assert len(site.server.token) >= 32


@pytest.mark.parametrize("path", ["/", "/x/", "/state", "/%(token)sx/state", "/x/%(token)s/", ""])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_request_without_the_token_is_refused_whatever_it_asks_for(method: str, path: str, site: Site) -> None:
    answer = site.ask(method, path % {"token": site.server.token}, {} if method == "POST" else None)
    assert answer.status == 403
    assert site.server.token.encode() not in answer.body
    assert b"checked" not in answer.body


def test_tokens_differ_from_server_to_server(site: Site, tmp_path: Path) -> None:
    for other in serve(tmp_path / "other.jsonl"):
        assert other.server.token != site.server.token


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1]", "0.0.0.0"])
def test_name_that_was_rebound_to_this_machine_is_refused(host: str, site: Site) -> None:
    assert site.get("state", Host=host).status == 403
    assert site.post("decide", {"id": "a", "decision": "keep"}, Host=host).status == 403
    assert read_decisions(site.path) == {}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999"])
def test_tunnel_from_another_port_is_this_machine(host: str, site: Site) -> None:
    assert site.get("state", Host=host).status == 200


def test_page_of_another_site_cannot_decide(site: Site) -> None:
    body = {"id": "a", "decision": "keep"}
    assert site.post("decide", body, Origin="http://evil.example").status == 403
    assert site.post("decide", body, Origin="null").status == 403
    assert site.post("decide", body, **{"Content-Type": "text/plain"}).status == 415
    assert read_decisions(site.path) == {}
    address = site.server.url.split("/")[2]
    assert site.post("decide", body, Origin=f"http://{address}").status == 200


@pytest.mark.parametrize("path", ["", "page.css", "page.js", "state", "rows/a", "nothing"])
def test_every_answer_forbids_scripts_of_others_frames_and_caches(path: str, site: Site) -> None:
    headers = site.get(path).headers
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


def test_page_names_no_address_but_its_own(site: Site) -> None:
    for path in ("", "page.css", "page.js"):
        answer = site.get(path)
        assert answer.status == 200
        text = answer.body.decode()
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML =" not in text
        assert "<script>" not in text, "the policy lets no inline script run"


@pytest.mark.parametrize(
    "path", ["../decisions.py", "..%2fserver.py", "%2e%2e/server.py", "rows/", "rows/zzz", "rows/a/b", "x"]
)
def test_nothing_else_is_served(path: str, site: Site) -> None:
    assert site.get(path).status == 404


# What it tells.


def test_row_travels_as_json_and_whole(site: Site) -> None:
    answer = site.get("rows/a")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.json == {"id": "a", "turns": [{"role": "text", "content": HOSTILE, "judged": True}]}


def test_filters_verdict_is_told_of_decided_rows_alone(site: Site) -> None:
    before = site.get("state").json
    assert before["filter"] == {}
    assert "perplexity" not in json.dumps(before) + site.get("rows/b").body.decode()
    after = site.decide("b", "keep").json
    score = {"name": "perplexity", "value": 2.5, "cut": 3.0}
    assert after["filter"] == {"b": {"decision": "drop", "scores": [score]}}
    assert site.decide("c", "keep").json["filter"]["c"]["scores"][0]["value"] is None
    assert site.post("undo", {}).json["filter"].keys() == {"b"}


def test_filters_verdict_is_told_of_all_rows_where_that_was_asked_for(tmp_path: Path) -> None:
    for site in serve(tmp_path / "d.jsonl", show_filter=True):
        assert site.get("state").json["filter"].keys() == {row.id for row in ROWS}


# What it saves.


def test_decision_is_in_the_file_when_the_answer_comes(site: Site) -> None:
    assert site.decide("a", "keep").json["decided"] == {"a": "keep"}
    assert read_decisions(site.path) == {"a": "keep"}
    site.decide("a", "drop")
    assert read_decisions(site.path) == {"a": "drop"}
    assert site.post("undo", {}).json["undone"] == "a"
    assert read_decisions(site.path) == {"a": "keep"}
    assert site.post("undo", {}).json["decided"] == {}
    assert read_decisions(site.path) == {}
    assert site.post("undo", {}).json["undone"] is None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"id": "a", "decision": "perhaps"}, 400),
        ({"id": "a", "decision": None}, 400),
        ({"id": ["a"], "decision": "keep"}, 400),
        ({"id": "nobody", "decision": "keep"}, 404),
        ({}, 400),
        ([], 400),
        ({"id": "a" * 5000, "decision": "keep"}, 413),
    ],
)
def test_what_is_no_decision_changes_nothing(body: Any, status: int, site: Site) -> None:
    assert site.post("decide", body).status == status
    assert read_decisions(site.path) == {}
    assert site.get("state").status == 200


def test_body_that_is_no_json_or_has_no_length_is_refused(site: Site) -> None:
    for head in (
        "Content-Length: 3\r\n\r\n{a}",
        "Content-Length: -1\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ):
        with socket.create_connection(site.server.server_address[:2], timeout=10) as raw:
            start = (
                f"POST /{site.server.token}/decide HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            raw.sendall((start + head).encode())
            assert raw.recv(100).split()[1] in (b"400", b"413")
    assert site.get("state").status == 200


def test_many_tabs_at_once_lose_and_mix_nothing(site: Site) -> None:
    ids = [row.id for row in ROWS]
    jobs = [(id, "keep" if number % 2 else "drop") for number, id in enumerate(ids * 4)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda job: site.decide(*job), jobs))
    assert {answer.status for answer in answers} == {200}
    lines = [json.loads(line) for line in site.path.read_text().splitlines()]
    assert sorted((line["id"], line["decision"]) for line in lines) == sorted(jobs)
    assert read_decisions(site.path) == site.get("state").json["decided"]
    assert len(read_decisions(site.path)) == len(ids)


def test_what_was_decided_before_is_there_after_a_restart(tmp_path: Path) -> None:
    for site in serve(tmp_path / "d.jsonl"):
        site.decide("a", "keep")
        site.decide("b", "drop")
    for site in serve(tmp_path / "d.jsonl"):
        state = site.get("state").json
        assert state["decided"] == {"a": "keep", "b": "drop"}
        assert site.post("undo", {}).json["undone"] == "b"


def test_decision_about_a_row_of_another_sample_is_not_undone_here(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": "elsewhere", "decision": "keep"}\n')
    for site in serve(tmp_path / "d.jsonl"):
        state = site.get("state").json
        assert (state["undo"], state["decided"]) == (None, {})
        assert site.post("undo", {}).json["undone"] is None
    assert read_decisions(tmp_path / "d.jsonl") == {"elsewhere": "keep"}


def test_full_disk_is_told_and_the_row_stays_open(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DecisionLog, line: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DecisionLog, "_append", full)
    answer = site.decide("a", "keep")
    assert (answer.status, b"No space left" in answer.body) == (507, True)
    monkeypatch.undo()
    assert site.get("state").json["decided"] == {}


def test_port_that_is_taken_is_told(site: Site) -> None:
    for port in (site.server.server_address[1], 70_000):
        with pytest.raises(RequestError, match=f"port {port} of 127.0.0.1 can't be used"):
            ReviewServer(site.server.session, port)

"""The part of W&B's server that wandb 0.31 needs to start, resume and upload a run. Uploads are kept in memory.

The server itself is not under test. It stores history rows by line, according to the offsets of the protocol, and
reports their number to a run that resumes.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "project", "name": "p", "entity": {"id": "entity", "name": "me"}}


class WandbServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, list[dict[str, Any]]] = {}
        """History rows by run id."""
        self.started: set[str] = set()

    @property
    def environment(self) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.server_port}"
        return {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}

    def respond(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = str(variables.get("name"))
        rows = self.history.setdefault(name, [])
        if "query RunResumeStatus" in query:
            bucket = self._resumed(name, rows) if name in self.started else None
            return {"model": {**PROJECT, "bucket": bucket}}
        if "mutation UpsertBucket" in query:
            new = name not in self.started
            self.started.add(name)
            bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "historyLineCount": len(rows)}
            return {"upsertBucket": {"bucket": {**bucket, "project": PROJECT}, "inserted": new}}
        if "CreateRunFiles" in query:
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}}
        if "viewer" in query.lower():
            return {"viewer": {"id": "user", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _resumed(self, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        lines = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
        last = {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "summaryMetrics": "{}"}
        config = {"config": "{}", "wandbConfig": '{"t": {}}', "tags": [], "stopped": False}
        return {"id": name, "name": name, "displayName": name, **lines, **last, **config}


class Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def log_message(self, *words: object) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data or b"{}")
        if self.path.endswith("/file_stream"):
            rows = self.server.history.setdefault(self.path.split("/")[-2], [])
            chunk = (body.get("files") or {}).get("wandb-history.jsonl", {"offset": len(rows), "content": []})
            begin = chunk["offset"]
            rows[begin : begin + len(chunk["content"])] = map(json.loads, chunk["content"])
            response: dict[str, Any] = {}
        else:
            response = {"data": self.server.respond(body.get("query", ""), body.get("variables") or {})}
        content = json.dumps(response).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()

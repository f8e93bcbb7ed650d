"""A minimal server that receives runs from W&B's client. The real server would need a license and a container."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """What was uploaded.

    Attributes:
        history: Lines of the history of each run, each at the offset that the client gave.
        groups: Group of each run.
    """

    def __init__(self) -> None:
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.groups: dict[str, str] = {}
        self.url = ""

    def steps(self, run: str) -> list[int]:
        """Return the steps of a run in the order of its lines."""
        lines = self.history.get(run, {})
        return [lines[offset]["_step"] for offset in sorted(lines)]

    def answer(self, path: str, content: dict[str, Any]) -> Any:
        """Return the answer to a request."""
        if path.endswith("/file_stream"):
            run, files = path.split("/")[-2], content.get("files") or {}
            if lines := files.get("wandb-history.jsonl"):
                own = self.history.setdefault(run, {})
                own |= {lines["offset"] + index: json.loads(line) for index, line in enumerate(lines["content"])}
            return {}
        if path != "/graphql":
            return {}
        query, values = content["query"], content.get("variables") or {}
        return {"data": next((make(values) for name, make in self._answers().items() if name in query), {})}

    def _answers(self) -> dict[str, Any]:
        return {"RunResumeStatus": self._resume, "UpsertBucket": self._upsert, "CreateRunFiles": self._create_files} | {
            "viewer": lambda _: {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}}
        }

    def _bucket(self, run: str) -> dict[str, Any]:
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "me"}}
        lines = len(self.history.get(run, {}))
        about = {"id": "b", "name": run, "displayName": run, "config": "{}", "project": project, "tags": []}
        return {**about, "historyLineCount": lines}

    def _upsert(self, values: dict[str, Any]) -> dict[str, Any]:
        run = values.get("name") or ""
        new = run not in self.history
        self.history.setdefault(run, {})
        if values.get("groupName"):
            self.groups[run] = values["groupName"]
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": new}}

    def _resume(self, values: dict[str, Any]) -> dict[str, Any]:
        model: dict[str, Any] = {"id": "p", "name": "project", "internalId": "1", "entity": {"id": "e", "name": "me"}}
        if values["name"] not in self.history:
            return {"model": {**model, "bucket": None}}
        lines = self.history[values["name"]]
        tail = json.dumps([json.dumps(lines[max(lines)])]) if lines else "[]"
        counts = {"logLineCount": 0, "eventsLineCount": 0}
        texts = {"summaryMetrics": "{}", "wandbConfig": "{}", "historyTail": tail, "eventsTail": "[]"}
        return {"model": {**model, "bucket": {**self._bucket(values["name"]), **counts, **texts}}}

    def _create_files(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}


@contextmanager
def serve() -> Iterator[WandbServer]:
    """Yield a server that runs on this machine."""
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            content = json.loads(body) if self.headers.get("content-type", "").startswith("application/json") else {}
            text = json.dumps(state.answer(self.path, content)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()

"""A server on the loopback interface with the parts of the Hugging Face Hub's protocol that pushing and loading need.

The Hub itself is out of reach of a test. What talks to this server is the real huggingface_hub, timm and transformers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

TOKEN = "hf_test"


@dataclass
class Repository:
    """A repository: its files, and the number of its commits."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


class Hub:
    """The content of the hub, the requests that it received, and how to reach it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # large files that were uploaded before their commit
        self.requests: list[str] = []
        self.refuse_uploads = False
        self.url = ""

    def environment(self, home: Path, token: str = TOKEN) -> dict[str, str]:
        """Return the environment variables with which a process uses this hub."""
        return {
            **{"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HOME": str(home)},
            **{"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"},
        }

    def run_python(self, code: str, *arguments: Path, home: Path) -> None:
        """Run code in a new process that uses this hub."""
        command = [sys.executable, "-c", code, *map(str, arguments)]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, **self.environment(home)})


def code_of(card: str) -> str:
    """Return the Python code in a model card."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()

    class Handler(_Handler):
        content = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    content: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def handle_request(self) -> None:
        hub, path = self.content, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        match self.command, path:
            case "POST", "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.repositories.setdefault(name, Repository(bool(asked.get("private"))))
                return self.answer(200, {"url": f"{hub.url}/{name}"})
            case "POST", "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            case "PUT", _ if path.startswith("/lfs/"):
                hub.blobs[path.removeprefix("/lfs/")] = body
                return self.answer(200, {})
        found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w-]+)(?:\.git)?(/.*)?", path)
        repository = hub.repositories.get(found[1]) if found else None
        if found is None or repository is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self.answer_for(found[1], repository, found[2] or "", body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer_for(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        hub = self.content
        if rest in ("", "/revision/main"):
            files = [{"rfilename": path} for path in repository.files]
            about = {"id": name, "private": repository.private, "sha": repository.sha, "siblings": files}
            self.answer(200, about)
        elif rest.startswith("/tree/"):
            sizes = {path: len(content) for path, content in repository.files.items()}
            self.answer(200, [{"type": "file", "path": p, "size": size, "oid": "0" * 40} for p, size in sizes.items()])
        elif rest.startswith("/preupload/"):
            if hub.refuse_uploads:
                return self.answer(
                    403, {"error": "You may not write here"}, {"X-Error-Message": "You may not write here"}
                )
            modes = {file["path"]: file["path"].endswith(".safetensors") for file in json.loads(body)["files"]}
            kinds = [
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                for path, large in modes.items()
            ]
            self.answer(200, {"files": kinds})
        elif rest == "/info/lfs/objects/batch":
            objects = [
                {**asked, "actions": {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif rest.startswith("/commit/"):
            self.commit(name, repository, [json.loads(line) for line in body.splitlines()])
        elif rest.startswith("/resolve/") and (file := rest.split("/", 3)[3]) in repository.files:
            content = repository.files[file]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.sha})
        else:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        return None

    def commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.content.blobs[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        repository.commits += 1
        url = f"{self.content.url}/{name}/commit/{repository.sha}"
        self.answer(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for header, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

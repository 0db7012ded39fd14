"""A small local server that speaks the Hub's protocol: what a repository holds, and its files, or parts of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files by name. `refuses`: (status, X-Error-Code) of every answer; `drops`: a connection ends half-way through
    this file; `lies`: this file is announced with the hash of another.
    """

    files: Mapping[str, bytes]
    revisions: Mapping[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    refuses: tuple[int, str] | None = None
    drops: str | None = None
    lies: str | None = None


class Hub(ThreadingHTTPServer):
    """`requests` lists what it was asked for."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = dict(repositories)
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub = self.server
        assert isinstance(hub, Hub)
        path = unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", path)
        name = (info or file or [None, ""])[1]
        repository = hub.repositories.get(str(name))
        if repository is None:
            return self.refuse(401, "RepoNotFound")
        if repository.refuses is not None:
            return self.refuse(*repository.refuses)
        if info:
            return self.say(repository, str(name), info[2] or "main", body)
        assert file is not None
        return self.give(repository, file[2], body)

    def say(self, repository: Repository, name: str, revision: str, body: bool) -> None:
        if revision not in repository.revisions:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": file} for file in repository.files]
        answer = {"id": name, "sha": repository.revisions[revision], "siblings": siblings, "tags": []}
        return self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

    def give(self, repository: Repository, rest: str, body: bool) -> None:
        revision = next((r for r in repository.revisions if rest.startswith(f"{r}/")), None)
        if revision is None:
            return self.refuse(404, "RevisionNotFound")
        file, known = rest.removeprefix(f"{revision}/"), {"X-Repo-Commit": repository.revisions[revision]}
        if file not in repository.files:
            return self.refuse(404, "EntryNotFound", known)
        content = repository.files[file]
        announced = b"another" if file == repository.lies else content
        known |= {"ETag": f'"{hashlib.sha256(announced).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, start = 206, int(found[1])
            end = int(found[2]) + 1 if found[2] else len(content)
            known["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            content = content[start:end]
        return self.send(status, known, content, body, cut=file == repository.drops)

    def refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": code} | dict(headers or {}), b"", False)

    def send(self, status: int, headers: Mapping[str, str], content: bytes, body: bool, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in (dict(headers) | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@contextmanager
def hub(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    with Hub(repositories) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()

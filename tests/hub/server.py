"""A small local server that speaks the Hub's protocol: what a repository holds, and its files, or parts of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TypeVar
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

ServerT = TypeVar("ServerT", bound="Hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = (".safetensors", ".npz", ".pt", ".bin")


class Damaged(bytes):
    """Content that is announced with the sha256 of another: `announced`."""

    announced: str


@dataclass
class Repository:
    """Files by name. `refuses`: (status, X-Error-Code) of every answer; `drops`: a connection ends half-way through
    this file; `lies`: this file is announced with the hash of another. `trees`: the files of commits that have
    others than `files`.
    """

    files: Mapping[str, bytes]
    revisions: Mapping[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    refuses: tuple[int, str] | None = None
    drops: str | None = None
    lies: str | None = None
    private: bool = False
    trees: dict[str, Mapping[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> Mapping[str, bytes]:
        return self.trees.get(self.revisions[revision], self.files)


class Hub(ThreadingHTTPServer):
    """`requests` lists what it was asked for."""

    daemon_threads = True

    def __init__(
        self, repositories: Mapping[str, Repository], handler: type[BaseHTTPRequestHandler] | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.repositories = dict(repositories)
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def oid(path: str, content: bytes) -> str:
    """What a file is announced under: of LFS files the sha256, of others git's sha1."""
    if path.endswith(LFS):
        return content.announced if isinstance(content, Damaged) else hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
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
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", path)
        name = (info or tree or file or [None, ""])[1]
        repository = hub.repositories.get(str(name))
        if repository is None:
            return self.refuse(401, "RepoNotFound")
        if repository.refuses is not None:
            return self.refuse(*repository.refuses)
        if info:
            return self.say(repository, str(name), info[2] or "main", body)
        if tree:
            return self.list(repository, tree[2], body)
        assert file is not None
        return self.give(repository, file[2], body)

    def say(self, repository: Repository, name: str, revision: str, body: bool) -> None:
        if revision not in repository.revisions:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": file} for file in repository.at(revision)]
        answer = {"id": name, "sha": repository.revisions[revision], "siblings": siblings, "tags": []}
        answer["private"] = repository.private
        return self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

    def list(self, repository: Repository, revision: str, body: bool) -> None:
        """All files, as with ?recursive=true."""
        if revision not in repository.revisions:
            return self.refuse(404, "RevisionNotFound")
        files = repository.at(revision).items()
        answer = [
            {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
            for path, content in files
        ]
        return self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), body)

    def give(self, repository: Repository, rest: str, body: bool) -> None:
        revision = next((r for r in repository.revisions if rest.startswith(f"{r}/")), None)
        if revision is None:
            return self.refuse(404, "RevisionNotFound")
        file, known = rest.removeprefix(f"{revision}/"), {"X-Repo-Commit": repository.revisions[revision]}
        content = repository.at(revision).get(file)
        if content is None:
            return self.refuse(404, "EntryNotFound", known)
        announced = oid(file, b"another" if file == repository.lies else content)
        known |= {"ETag": f'"{announced}"', "Accept-Ranges": "bytes"}
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
def served(server: ServerT) -> Iterator[ServerT]:
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def hub(repositories: Mapping[str, Repository]) -> AbstractContextManager[Hub]:
    return served(Hub(repositories))


def use(server: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let the client ask this server, as HF_ENDPOINT does, with a download cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

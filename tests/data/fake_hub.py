"""A local HTTP server with as much of the Hub's protocol as `datasets` uses: one data set, one commit."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME, COMMIT = "someone/stories", "a" * 40


class Handler(BaseHTTPRequestHandler):
    """Serves the files of `folder` as data set NAME at commit COMMIT, branch main."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, asked: list[str], *args) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        api = re.fullmatch(rf"/api/datasets/{NAME}(?:/revision/(?P<revision>[^/]+))?", path)
        tree = re.fullmatch(rf"/api/datasets/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<under>.*))?", path)
        paths = re.fullmatch(rf"/api/datasets/{NAME}/paths-info/(?P<revision>[^/]+)", path)
        file = re.fullmatch(rf"/datasets/{NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", path)
        found = api or tree or paths or file
        if found is None:
            self.error(404, "RepoNotFound")
        elif found["revision"] not in (None, "main", COMMIT):
            self.error(404, "RevisionNotFound")
        elif api:
            self.json({"_id": "1", "id": NAME, "sha": COMMIT, "siblings": []})
        elif tree:
            self.tree(tree["under"] or "")
        elif paths:
            asked = re.findall(r"paths=([^&]+)", self.body.decode())
            wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else [unquote(p) for p in asked]
            self.json([self.entry(p) for w in wanted if (p := self.folder / w).exists()])
        elif file:
            self.file(self.folder / file["name"])

    def tree(self, under: str) -> None:
        inside = self.folder / under
        if not inside.is_dir():
            self.error(404, "EntryNotFound")
            return
        entries = inside.rglob("*") if re.search(r"recursive=([Tt]rue|1)", self.path) else inside.iterdir()
        self.json([self.entry(path) for path in sorted(entries)])

    def entry(self, path: Path) -> dict:
        name = str(path.relative_to(self.folder))
        if path.is_dir():
            return {"type": "directory", "oid": "d" * 40, "size": 0, "path": name}
        return {"type": "file", "oid": etag(path), "size": path.stat().st_size, "path": name}

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.error(404, "EntryNotFound")
            return
        content, code, headers = path.read_bytes(), 200, {}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, code = content[start:stop], 206
        self.send(code, content, {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, **headers})

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, code: int, kind: str) -> None:
        self.send(code, b"{}", {"X-Error-Code": kind, "X-Error-Message": kind})

    def send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag(path: Path) -> str:
    return sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, the requests so far) while the server runs."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, folder, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()

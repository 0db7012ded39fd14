"""A small local server that speaks the download protocol of the Hugging Face Hub, with a few odd repositories."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT}


class HubServer(ThreadingHTTPServer):
    """`someone/tiny` has the files of `folder`; `requests` lists what it was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.closing = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> HubServer:
        assert isinstance(self.server, HubServer)
        return self.server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path, _, _ = self.path.partition("?")
        repository, _, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        match repository:
            case "someone/gated":
                self.refuse(403, "GatedRepo", "Access to model someone/gated is restricted.")
            case "someone/down":
                self.refuse(503, "", "Service Unavailable")
            case "someone/slow":
                self.hub.closing.wait(30)
            case "someone/website":
                self.send(200, {"ETag": "x"}, b"{}", body)
            case "someone/tiny" if revision not in REVISIONS:
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            case "someone/tiny" | "someone/empty":
                data = self.hub.folder / file
                known = {"X-Repo-Commit": REVISIONS[revision]}
                if repository == "someone/empty" or not data.is_file():
                    self.refuse(404, "EntryNotFound", "Entry not found", known)
                else:
                    content = data.read_bytes()
                    self.send(200, known | {"ETag": hashlib.sha1(content).hexdigest()}, content, body)
            case _ if path == f"/api/models/someone/tiny/tree/{COMMIT}/additional_chat_templates":
                self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": COMMIT})
            case _:  # what the Hub says to somebody who is not logged in
                self.refuse(401, "RepoNotFound", "Invalid username or password.")

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": message} | (headers or {}), b"", False)

    def send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    with HubServer(folder) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()

"""The writing half of the local Hub: repositories, LFS uploads and commits, and how they go wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from tests.hub.server import LFS, Damaged, Handler, Hub, Repository, oid

TOKEN = "hf_may_write"
FIRST_COMMIT = "c" * 40
Answer = tuple[int, dict[str, Any]]
NAME = r"([^/]+/[^/]+)"


class WritableHub(Hub):
    """`refuses`: the status by step; `drops`: steps whose connection ends, "upload" half-way through
    the content, others when the work is done. `damages`: content is stored with one bit changed. `after`: what
    happens when a step is done.

    Steps: create, branch, yaml, preupload, batch, upload, verify, commit.
    """

    def __init__(self, repositories: Mapping[str, Repository] | None = None) -> None:
        super().__init__(repositories or {}, WritingHandler)
        self.objects: dict[str, bytes] = {}  # by sha256
        self.refuses: dict[str, int] = {}
        self.drops: set[str] = set()
        self.damages = False
        self.after: dict[str, Callable[[], object]] = {}

    def revisions(self, repo: str) -> dict[str, str]:
        revisions = self.repositories[repo].revisions
        assert isinstance(revisions, dict)
        return revisions

    def put(self, repo: str, tree: Mapping[str, bytes], branch: str = "main") -> str:
        """A commit with these files."""
        revisions = self.revisions(repo)
        made = hashlib.sha1(f"{revisions[branch]} {sorted(tree.items())}".encode()).hexdigest()
        self.repositories[repo].trees[made] = tree
        revisions |= {branch: made, made: made}
        return made

    def files(self, repo: str, revision: str = "main") -> Mapping[str, bytes]:
        return self.repositories[repo].at(revision)


class WritingHandler(Handler):
    def do_POST(self) -> None:
        self.work()

    def do_PUT(self) -> None:
        self.work()

    def work(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {path}")
        steps: dict[str, tuple[str, Callable[..., Answer]]] = {
            "create": ("/api/repos/create", self.create),
            "yaml": ("/api/validate-yaml", self.validate),
            "branch": (f"/api/models/{NAME}/branch/(.+)", self.branch),
            "preupload": (f"/api/models/{NAME}/preupload/(.+)", self.preupload),
            "batch": (rf"/{NAME}\.git/info/lfs/objects/batch", self.batch),
            "upload": (r"/lfs/(\w+)", self.upload),
            "verify": ("/verify", self.verify),
            "commit": (f"/api/models/{NAME}/commit/(.+)", self.commit),
        }
        step, found = next((s, m) for s, (pattern, _) in steps.items() if (m := re.fullmatch(pattern, path)))
        if step == "upload" and step in hub.drops:
            self.rfile.read(10)
            self.close_connection = True
            return
        content = self.content()
        may = self.headers.get("Authorization") == f"Bearer {TOKEN}" or step in ("upload", "verify")
        refused = hub.refuses.get(step) or (None if may else 401)
        status, said = (refused, {}) if refused else steps[step][1](*found.groups(), content)
        hub.after.get(step, lambda: None)()
        if step in hub.drops:
            self.close_connection = True
            return
        self.send(status, {"Content-Type": "application/json"}, json.dumps(said).encode(), True)

    @property
    def hub(self) -> WritableHub:
        assert isinstance(self.server, WritableHub)
        return self.server

    def content(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def create(self, content: bytes) -> Answer:
        asked = json.loads(content)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return 409, {"url": f"{self.hub.url}/{name}"}
        revisions = {"main": FIRST_COMMIT, FIRST_COMMIT: FIRST_COMMIT}
        private = asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository({".gitattributes": b""}, revisions, private=private)
        return 200, {"url": f"{self.hub.url}/{name}"}

    def validate(self, content: bytes) -> Answer:
        assert json.loads(content)["content"].startswith("---\n")
        return 200, {"errors": [], "warnings": []}

    def branch(self, repo: str, branch: str, content: bytes) -> Answer:
        revisions = self.hub.revisions(repo)
        if branch in revisions:
            return 409, {}
        revisions[branch] = revisions["main"]
        return 200, {}

    def preupload(self, repo: str, branch: str, content: bytes) -> Answer:
        held = self.hub.files(repo, branch)
        files = [
            {"path": p, "uploadMode": mode(p), "shouldIgnore": False, "oid": oid(p, held[p]) if p in held else None}
            for p in (file["path"] for file in json.loads(content)["files"])
        ]
        return 200, {"files": files}

    def batch(self, repo: str, content: bytes) -> Answer:
        asked = json.loads(content)
        assert asked["operation"] == "upload"
        objects: list[dict[str, Any]] = []
        for item in asked["objects"]:
            known = {"oid": item["oid"], "size": item["size"]}
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/verify"},
            }
            objects.append(known if item["oid"] in self.hub.objects else known | {"actions": actions})
        return 200, {"transfer": "basic", "objects": objects}

    def upload(self, sha256: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != sha256:
            return 400, {}
        if self.hub.damages:
            content = Damaged(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])  # the last number's last bit
            content.announced = sha256
        self.hub.objects[sha256] = content
        return 200, {}

    def verify(self, content: bytes) -> Answer:
        asked = json.loads(content)
        stored = self.hub.objects.get(asked["oid"], b"")
        return (200 if len(stored) == asked["size"] else 422), {}

    def commit(self, repo: str, branch: str, content: bytes) -> Answer:
        items = [json.loads(line) for line in content.splitlines()]
        assert items[0]["key"] == "header"
        revisions = self.hub.revisions(repo)
        if items[0]["value"].get("parentCommit", revisions[branch]) != revisions[branch]:
            return 412, {}
        tree = dict(self.hub.files(repo, branch))
        for item in items[1:]:
            value = item["value"]
            if item["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                tree[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert item["key"] == "deletedFile"
                del tree[value["path"]]
        made = self.hub.put(repo, tree, branch)
        return 200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{made}", "commitOid": made}


def mode(path: str) -> str:
    return "lfs" if path.endswith(LFS) else "regular"

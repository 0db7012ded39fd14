"""References to dictionaries: a path, a place in a repository of the Hub, or the alias of a release."""

from __future__ import annotations

import re
from typing import NamedTuple

from dictlearn.types import DictlearnError

FORMS = (
    "a folder or file, or 'user/repository:path/in/it@revision', of which the path and @revision may be left out"
)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REVISION = re.compile(r"[\w./-]+")


class HubRef(NamedTuple):
    """A place in a model repository of the Hub; `path` is "" for its root, `revision` None for its main branch."""

    repo: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        path = f":{self.path}" if self.path else ""
        return f"{self.repo}{path}" + (f"@{self.revision}" if self.revision else "")


def parse(ref: str) -> HubRef:
    """`user/repository:path@revision` or `user/repository@revision:path`; paths may hold further colons.

    Raises DictlearnError where it is none, or where the path leads out of the repository.
    """
    rest, revision = ref, None
    head, at, tail = rest.rpartition("@")
    if at and not (":" in tail and _REPO.fullmatch(head)):
        rest, revision = head, tail
    repo, colon, path = rest.partition(":")
    if "@" in repo and revision is None:
        repo, _, revision = repo.partition("@")
    path = path.strip("/")
    if not _REPO.fullmatch(repo) or (colon and not path) or (at and not _REVISION.fullmatch(revision or "")):
        raise DictlearnError(f"A dictionary is named by {FORMS}; got {ref!r}.")
    if any(part in ("", ".", "..") for part in path.split("/") if path):
        raise DictlearnError(f"A path in a repository has no empty parts, '.' or '..'; got {path!r} in {ref!r}.")
    return HubRef(repo, path, revision)

"""The files of dictionaries, by name: in a local folder, or in a repository of the Hugging Face Hub.

Of a repository only the files that are asked for are downloaded, into the Hub's cache; offline the cache is what
there is. Whatever is named, in a reference or in a downloaded file, lies below the folder or is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from dictlearn.hub.refs import HubRef
from dictlearn.types import DictlearnError

TIMEOUT_SECONDS = 10.0  # of the first question to the Hub
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
MOST_FILES = 100_000  # of a local folder


@dataclass(frozen=True)
class Files:
    """What is in a folder: `names` are relative to it, with '/'; `path` gives the local file of a name.

    `where` stands for the folder in messages. `source` says what it is: {"repo", "revision"} of the Hub (the
    commit), {} of a local folder. `used` are the names asked for so far.
    """

    where: str
    names: tuple[str, ...]
    fetch: Callable[[str], Path] = field(repr=False)
    source: Mapping[str, Any] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)  # an ordered set

    def origin(self, place: str) -> str:
        """`place` below the repository's id, or below the full path of the folder: names in it may be all that says
        what a dictionary is of.
        """
        above = self.source.get("repo") or os.path.abspath(self.where)  # noqa: PTH100  # links keep their names
        return f"{above}/{place}".rstrip("/")

    def path(self, name: str) -> Path:
        """The local file, downloaded if need be. Raises DictlearnError where there is none of this name."""
        if name not in self.names:
            raise DictlearnError(f"{self.where} has no file {name!r}.")
        self.used[name] = None
        return self.fetch(name)

    def anew(self) -> Files:
        """The same files, of which none has been asked for."""
        return replace(self, used={})

    def place(self, name: str) -> str:
        """`name` in messages."""
        return f"{self.where}/{name}"

    def has(self, place: str) -> bool:
        """Whether `place` is a file, or a folder that is not empty."""
        return place == "" or place in self.names or any(name.startswith(f"{place}/") for name in self.names)


def expanded(path: str | Path) -> Path:
    """With the home folder for `~`; a name of no user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises there


def local_files(folder: Path) -> Files:
    """The files below `folder`. Links that lead out of it are refused when they are asked for."""
    root = folder.resolve()
    names: list[str] = []
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [str((Path(parent) / name).relative_to(root).as_posix()) for name in sorted(files)]
        if len(names) > MOST_FILES:
            raise DictlearnError(
                f"{folder} holds more than {MOST_FILES:,} files: name the dictionary's own folder."
            )
    allowed = _allowed(root)

    def fetch(name: str) -> Path:
        path = root / PurePosixPath(name)
        if not path.resolve().is_relative_to(allowed):
            raise DictlearnError(f"{path} is a link that leads out of its folder, to {path.resolve()}: refused.")
        return path

    return Files(str(folder), tuple(names), fetch)


def _allowed(root: Path) -> Path:
    """Where links may lead: in the Hub's cache snapshots are links to blobs beside them."""
    snapshots = next((parent for parent in (root, *root.parents) if parent.name == "snapshots"), None)
    return snapshots.parent if snapshots is not None and (snapshots.parent / "blobs").is_dir() else root


def hub_files(ref: HubRef) -> Files:
    """The files of the repository at the revision of `ref` (None: main); one request, none where offline.

    Raises DictlearnError: no such repository or revision, a gated one, the Hub cannot be reached and nothing of it
    is in the cache.
    """
    hub, where = constants.ENDPOINT, f"{ref.repo}" + (f"@{ref.revision}" if ref.revision else "")
    try:
        info = HfApi().model_info(ref.repo, revision=ref.revision, timeout=TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise DictlearnError(
            f"{ref.repo} is gated: accept its licence on {hub}/{ref.repo}, then {LOG_IN}."
        ) from error
    except RevisionNotFoundError as error:
        raise DictlearnError(
            f"{ref.repo} has no revision {ref.revision!r}: a branch, tag or commit, see {hub}/{ref.repo}/tree/main."
        ) from error
    except RepositoryNotFoundError as error:
        raise DictlearnError(
            f"There is no {ref.repo!r}: no file here and no repository on {hub} has this name (if it is private, "
            f"{LOG_IN})."
        ) from error
    except HFValidationError as error:
        raise DictlearnError(f"{ref.repo!r} is no Hub id: {error}") from error
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        return _cached_files(ref, where, _first_line(error))
    if info.sha is None or info.siblings is None:
        raise DictlearnError(
            f"{hub} is no Hugging Face Hub: its answer about {ref.repo} names no commit and no files."
        )
    names = tuple(sorted(sibling.rfilename for sibling in info.siblings))
    return _in_repository(ref.repo, info.sha, names, where)


def _cached_files(ref: HubRef, where: str, reason: str) -> Files:
    """What earlier downloads have left of the revision; of no revision, of main, else of the newest one."""
    cache = Path(constants.HF_HUB_CACHE)
    repos = scan_cache_dir(cache).repos if cache.is_dir() else ()
    kept = [r for repo in repos if (repo.repo_type, repo.repo_id) == ("model", ref.repo) for r in repo.revisions]
    asked = ref.revision or "main"
    named = [r for r in kept if asked in r.refs or r.commit_hash == asked]
    found = named or (sorted(kept, key=lambda r: r.last_modified)[-1:] if ref.revision is None else [])
    if not found:
        raise DictlearnError(
            f"{where} is no file here and not in the download cache ({cache}), and {constants.ENDPOINT} cannot be "
            f"reached: {reason}"
        )
    folder = found[0].snapshot_path
    names = tuple(sorted(file.file_path.relative_to(folder).as_posix() for file in found[0].files))
    return _in_repository(ref.repo, found[0].commit_hash, names, f"{where} (what of it is in the download cache)")


def _in_repository(repo: str, commit: str, names: tuple[str, ...], where: str) -> Files:
    def fetch(name: str) -> Path:
        try:
            kept = try_to_load_from_cache(repo, name, revision=commit)
            if isinstance(kept, str):
                return Path(kept)
            path = Path(hf_hub_download(repo, name, revision=commit))
        except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
            raise DictlearnError(f"Cannot download {name} of {where}: {_first_line(error)}") from error
        _check_hash(path, name, where)
        return path

    return Files(where, names, fetch, {"repo": repo, "revision": commit})


def _check_hash(path: Path, name: str, where: str) -> None:
    """A file is kept under the hash that was announced: of a large one sha256, of others that of git. One with
    another is deleted, and DictlearnError raised.

    The client has put it into the cache before: where the process is killed in between, it stays unchecked.
    """
    announced = path.resolve().name
    kind = {64: "sha256", 40: "git's sha1"}.get(len(announced))
    if kind is None or not re.fullmatch(r"[0-9a-f]+", announced):
        return
    found = _digest(path, of_git=kind != "sha256")
    if found != announced:
        path.resolve().unlink()
        path.unlink()
        raise DictlearnError(
            f"{name} of {where} came with other content than announced ({kind} {found}, announced {announced}), "
            "and was deleted: try again; if it happens again, its repository is damaged."
        )


def _digest(path: Path, *, of_git: bool) -> str:
    """sha256 of the content, or the sha1 that git gives it: with its size before it."""
    hashed = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if of_git else hashlib.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashed).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Activations on disk: one pass of the LM that many runs read.

A store is a folder of safetensors shards, manifest.json (manifest.py), and the site statistics of the run that
wrote it. Every file is written beside its place, synced and renamed; the manifest names a shard once it is whole.
So a store that is not complete is a whole beginning: the same run, or one of the same settings, goes on after it.
Shards whose files are gone, from one up to the last, are written again in this way.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dictlearn.data.manifest import (
    LOCK,
    MANIFEST,
    ORIGIN,
    STATISTICS,
    Manifest,
    Shard,
    differences,
    n_activations,
    n_bytes,
    read_manifest,
    shard_name,
)
from dictlearn.data.normalize import SiteStatistics
from dictlearn.files import folder_problem, reason
from dictlearn.types import DictlearnError

PARTIAL = ".part"
REWRITE = (
    "delete it and all shards of higher numbers, and the command that wrote the store, with another run_dir, "
    "writes them again; or leave out data.store"
)


class ActivationStore:
    """The activations of one stream in `folder`, written once and read by later runs.

    `asked` says what the run needs: the keys of manifest.py's DECIDING, WRITTEN_FOR and NAMES, and `sites`.
    Raises DictlearnError with all that is in the way (`store_problems`). A store that is not complete is locked for
    this process until `close`.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self.folder = folder.absolute()
        self._lock: FileLock | None = None
        self._check(asked)
        manifest = read_manifest(self.folder)
        if manifest is None or not manifest.complete:
            self._lock = _locked(self.folder)
        try:
            if self._lock is not None:
                self._check(asked)  # what another run wrote meanwhile
                manifest = read_manifest(self.folder)
            self._manifest = manifest
            self.contents = dict(asked) if manifest is None else manifest.contents
            self._statistics = None if manifest is None else self._read_statistics(manifest)
        except DictlearnError:
            self.close()
            raise

    def _check(self, asked: Mapping[str, Any]) -> None:
        if found := store_problems(str(self.folder), asked):
            raise DictlearnError("; ".join(found))

    @property
    def shards(self) -> tuple[Shard, ...]:
        return () if self._manifest is None else self._manifest.shards

    @property
    def n_tokens(self) -> int:
        """Activations of the complete store."""
        return n_activations(self.contents)

    @property
    def n_stored(self) -> int:
        """Activations that are in whole shards."""
        return 0 if self._manifest is None else self._manifest.n_stored

    @property
    def complete(self) -> bool:
        return self._manifest is not None and self._manifest.complete

    @property
    def n_bytes(self) -> int:
        """Of the complete store, on disk."""
        return n_bytes(self.contents, self.n_tokens)

    def statistics(self) -> tuple[dict[str, SiteStatistics], dict[str, float], int] | None:
        """Of each site; the limits of the norm filter, empty without one; and the tokens that were asked for.

        None before `keep`, where there is no store yet.
        """
        return None if self._statistics is None else (*self._statistics, self.contents["statistics_n_tokens"])

    def keep(self, statistics: Mapping[str, SiteStatistics], limits: Mapping[str, float], n_tokens: int) -> None:
        """What later runs start from. From here on the folder belongs to runs of these contents."""
        self._statistics = dict(statistics), dict(limits)
        self.contents["statistics_n_tokens"] = n_tokens
        path = self.folder / STATISTICS
        with _whole(path) as partial:
            save_file(_flat(*self._statistics), partial)
        self._write_manifest(Manifest(self.contents, hashlib.sha256(path.read_bytes()).hexdigest()))

    def append(self, tensors: Mapping[str, Tensor], position: dict[str, Any]) -> None:
        """The next activations: site -> [n, d], and tokens, rows, positions [n], on the CPU in their stored dtypes.

        `position` is the stream's after them. Raises DictlearnError where they cannot be written.
        """
        manifest = self._manifest
        assert manifest is not None
        path = self.folder / shard_name(len(manifest.shards))
        with _whole(path) as partial:
            save_file(dict(tensors), partial)
        n = len(tensors["tokens"])
        sha256 = {name: _sha256(value) for name, value in tensors.items()}
        shard = Shard(n, path.stat().st_size, sha256, position)
        self._write_manifest(Manifest(self.contents, manifest.statistics_sha256, (*manifest.shards, shard)))

    def _write_manifest(self, manifest: Manifest) -> None:
        with _whole(self.folder / MANIFEST) as partial:
            partial.write_text(manifest.to_json())
        self._manifest = manifest

    def load(self, index: int, sites: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors of a shard: those of `sites`, and tokens, rows, positions; their hashes are compared.

        They are mapped from the file. Raises DictlearnError, naming the file, where it is not what was written.
        """
        path, shard = self.folder / shard_name(index), self.shards[index]
        names = (*sites, *ORIGIN)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise _damaged_shard(path, reason(error)) from error
        for name, value in tensors.items():
            width = [] if name in ORIGIN else [self.contents["sites"][name]]
            dtype = getattr(torch, str(ORIGIN.get(name, self.contents["dtype"])))
            if (list(value.shape), value.dtype) != ([shard.n, *width], dtype):
                raise _damaged_shard(path, f"{name} is {list(value.shape)} {value.dtype}")
            if _sha256(value) != shard.sha256[name]:
                raise _damaged_shard(path, f"{name} has another sha256 than in {MANIFEST}")
        return tensors

    def close(self) -> None:
        """Let other processes continue a store that is not complete."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read_statistics(self, manifest: Manifest) -> tuple[dict[str, SiteStatistics], dict[str, float]]:
        path = self.folder / STATISTICS
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.statistics_sha256:
                raise self._damaged(path, f"it has another sha256 than in {MANIFEST}")
            return _unflat(load_file(path), manifest.contents["sites"])
        except (OSError, SafetensorError, KeyError) as error:
            raise self._damaged(path, reason(error)) from error

    def _damaged(self, path: Path, what: str) -> DictlearnError:
        return DictlearnError(
            f"{path} is damaged ({what}): delete {self.folder} and let a run write it again, or leave out "
            "data.store"
        )


def _damaged_shard(path: Path, what: str) -> DictlearnError:
    return DictlearnError(f"{path} is damaged ({what}): {REWRITE}")


def store_problems(folder: str, asked: Mapping[str, Any]) -> list[str]:
    """Why a run cannot read the activation store in `folder`, continue it or write it there; one sentence each.

    `asked` has some or all of the keys of a manifest's contents; widths of sites may be None, and then the room on
    the disk is not looked at.
    """
    place = Path(folder)
    try:
        manifest = read_manifest(place)
    except DictlearnError as error:
        return [str(error)]
    if manifest is not None:
        if found := differences(manifest, asked):
            return [_refusal(folder, manifest, found)]
        if found := _missing_files(place, manifest):
            return found
        if manifest.complete:
            return []
    elif problem := folder_problem("data.store", folder):
        return [problem]
    elif place.is_dir() and (others := sorted(path.name for path in place.iterdir() if not _is_own(path))):
        return [f"data.store must be an empty folder or an activation store, but {folder} has {others[0]!r}"]
    if "sites" not in asked or None in asked["sites"].values():
        return []
    n_missing = n_activations(asked) - (0 if manifest is None else manifest.n_stored)
    needed, free = n_bytes(asked, n_missing), free_bytes(place)
    if needed > free:
        return [
            f"data.store={folder} needs {needed / 1e9:,.2f} GB for {n_missing:,} activations, and the disk has "
            f"{free / 1e9:,.2f} GB free: fewer n_tokens or sites, or another folder"
        ]
    return []


def free_bytes(folder: Path) -> int:
    """On the disk of a folder that may not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _refusal(folder: str, manifest: Manifest, found: list[str]) -> str:
    if manifest.complete:
        return (
            f"data.store={folder} holds other activations: {'; '.join(found)}. Use the settings that it was "
            "written with, another folder, or data.store=null"
        )
    return (
        f"data.store={folder} is not complete ({manifest.n_stored:,} of {manifest.n_tokens:,} activations), and "
        f"only a run of the same settings continues it: {'; '.join(found)}. Resume that run, delete the folder, or "
        "choose another one"
    )


def _missing_files(folder: Path, manifest: Manifest) -> list[str]:
    sizes = {shard_name(i): shard.n_bytes for i, shard in enumerate(manifest.shards)}
    wrong = [name for name, size in sizes.items() if not _has_size(folder / name, size)]
    if not wrong:
        return []
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return [f"{folder / wrong[0]}{more} is missing or has another size than in {MANIFEST}: {REWRITE}"]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_own(path: Path) -> bool:
    """Of what a writer leaves that was ended before its first shard was whole."""
    return path.name in (LOCK, STATISTICS, shard_name(0)) or path.suffix == PARTIAL


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise DictlearnError(
            f"data.store={folder} is being written by another run: wait for its end, or choose another folder"
        ) from None
    except OSError as error:
        raise DictlearnError(f"data.store={folder} cannot be written: {reason(error)}") from error
    return lock


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Write the file that is given, beside `path`; then it takes its place, or nothing is left of it."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)
        yield partial
        shutil.copymode(path.parent / LOCK, partial)  # safetensors' files are for their owner alone
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise DictlearnError(f"Cannot write {path} of data.store: {reason(error)}") from error


def _sha256(value: Tensor) -> str:
    return hashlib.sha256(value.view(torch.uint8).numpy()).hexdigest()  # type: ignore[arg-type]


def _flat(statistics: Mapping[str, SiteStatistics], limits: Mapping[str, float]) -> dict[str, Tensor]:
    """One tensor per number or vector; float64 and int64, so exactly."""
    named = {f"{site}/{key}": value for site, s in statistics.items() for key, value in s._asdict().items()}
    values = {key: value for key, value in named.items() if value is not None}
    values |= {f"{site}/limit": limit for site, limit in limits.items()}
    return {
        key: value.contiguous()
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        for key, value in values.items()
    }


def _unflat(
    tensors: Mapping[str, Tensor], sites: Mapping[str, int]
) -> tuple[dict[str, SiteStatistics], dict[str, float]]:
    def value(key: str) -> Any:
        return tensors[key] if tensors[key].ndim else tensors[key].item()

    def of_site(site: str) -> SiteStatistics:
        optional = [key for key in SiteStatistics._field_defaults if f"{site}/{key}" not in tensors]
        fields = (key for key in SiteStatistics._fields if key not in optional)
        return SiteStatistics(**{key: value(f"{site}/{key}") for key in fields})

    statistics = {site: of_site(site) for site in sites}
    return statistics, {site: value(f"{site}/limit") for site in sites if f"{site}/limit" in tensors}

"""Where dictionaries are among files, and what is read there, whatever the format."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from dictlearn.choices import is_count
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.codecs._sae_lens import CONFIG
from dictlearn.hub.codecs.base import Codec, NamingCodec
from dictlearn.hub.files import Files
from dictlearn.hub.origin import hf_id, modules_of, stated_l0
from dictlearn.hub.weights import read_json, read_yaml
from dictlearn.registry import kinds, lookup
from dictlearn.types import DictlearnError, FormatError

CODECS = "dictlearn.hub.codecs"
NATIVE = "native"
MOST_NAMED = 20  # places in a message
MOST_BYTES = 1_000_000  # of a configuration that is kept with the dictionary


@dataclass(frozen=True)
class Place:
    """A dictionary among files: `path` is the name of its folder ("" for the first one) or of its file."""

    files: Files
    path: str
    published_l0: float | None = None

    @property
    def name(self) -> str:
        """For folders and tables: that of its folder on disk, its path in a repository."""
        repo = self.files.source.get("repo")
        return _letters((self.path or repo.partition("/")[2]) if repo else self._on_disk.name)

    @property
    def full_name(self) -> str:
        """Where it is, in full."""
        source = self.files.source
        return f"{source['repo']}@{source['revision']}:{self.path}" if source else str(self._on_disk)

    @property
    def long_name(self) -> str:
        """With the name of its run or repository before it."""
        if repo := self.files.source.get("repo"):
            return _letters(f"{repo}_{self.path}")
        above = self._on_disk.parent
        return f"{(above.parent if above.name == 'dictionaries' else above).name}_{self.name}"

    @property
    def _on_disk(self) -> Path:
        return Path(self.files.where).resolve() / self.path

    @property
    def weights(self) -> Path:
        """The largest of the files that were needed to read the dictionary."""
        return max((self.files.path(name) for name in self.files.used), key=lambda path: path.stat().st_size)

    def read(self) -> Dictionary:
        """The dictionary, frozen, with its origin in `metadata`.

        Raises FormatError where the files are of no known format, of several, or not as their format has them.
        """
        self.files.used.clear()
        kind = self._format()
        dictionary = _codecs()[kind].read(self.files, self.path)
        if self.files.source or kind != NATIVE or not self._is_ours():
            dictionary.metadata = {**dictionary.metadata, **self._origin(kind, dictionary)}
        return dictionary

    def _is_ours(self) -> bool:
        """Whether native files are of this package: then they have said already where the dictionary is from."""
        return "dictlearn" in read_json(self.files.path(posixpath.join(self.path, CONFIG)))["metadata"]

    def _origin(self, kind: str, dictionary: Dictionary) -> dict[str, Any]:
        """The language model's id and contexts, the modules of the sites, the L0 published, and the source."""
        stated = dictionary.metadata
        lm, ctx, bos = hf_id(stated.get("lm_name")), stated.get("ctx"), stated.get("prepend_bos")
        of_text = {"ctx": ctx if is_count(ctx, 1) else None, "prepend_bos": bos if isinstance(bos, bool) else None}
        modules = modules_of(lm, (*dictionary.reads, *dictionary.writes))
        source = self._source(kind)
        l0 = self.published_l0 or stated_l0(self.files.origin(self.path), source["config"])
        return {"lm_name": lm, **of_text, "modules": modules, "published_l0": l0, "source": source}

    def _format(self) -> str:
        codecs = _codecs()
        found = [
            kind
            for kind, codec in codecs.items()
            if self.path in _found(codec, self.files.names, named=True) and codec.matches(self.files, self.path)
        ]
        if len(found) == 1:
            return found[0]
        inside = [name for name in self.files.names if self.path in (posixpath.dirname(name), name)]
        looked_for = "; ".join(f"{kind}: {codec.layout}" for kind, codec in codecs.items())
        raise FormatError(
            f"{self.files.place(self.path) if self.path else self.files.where} must be of exactly one known "
            f"format; it is {' and '.join(found) or 'none'}. Looked for: {looked_for}. Files: {some(inside)}."
        )

    def _source(self, kind: str) -> dict[str, Any]:
        """Repository and revision, or the folder; the path in it, the format, and the configurations read."""
        configs = {name: content for name in self.files.used if (content := _config(self.files.path(name)))}
        where = self.files.source or {"folder": self.files.where}
        return {**where, "path": self.path, "format": kind, "config": configs}


def is_pattern(path: str) -> bool:
    """Whether a path in a repository stands for all places that match it."""
    return "*" in path or "?" in path


def places(files: Files, *, named: bool = False) -> list[str]:
    """Where dictionaries are, as far as the names of the files tell.

    named: with those that only their own path stands for, such as checkpoints of a training.
    """
    return sorted({place for codec in _codecs().values() for place in _found(codec, files.names, named=named)})


def place_of_file(files: Files, name: str) -> str | None:
    """What a file is of: itself, or the dictionary that is not there without it, as a folder; None for others.

    Raises DictlearnError where several are not there without it.
    """
    if name in places(files, named=True):
        return name
    others = replace(files, names=tuple(other for other in files.names if other != name))
    found = sorted(set(places(files)) - set(places(others)))
    if len(found) > 1:
        raise DictlearnError(
            f"{files.place(name)} is of {len(found)} dictionaries: name the path of one; {some(found)}."
        )
    return found[0] if found else None


def places_at(files: Files, path: str) -> list[str]:
    """`path` itself, the dictionary of this file, the only place of one below it, or all that match where it has a
    `*` or `?`.

    Raises DictlearnError where there is nothing, or more than one without a pattern.
    """
    found = places(files)
    if is_pattern(path):
        pattern = path.replace("[", "[[]")
        if matching := [place for place in found if fnmatch.fnmatchcase(place, pattern)]:
            return matching
        raise DictlearnError(f"{files.where} has no dictionary {path!r}; it has {some(found)}.")
    if not files.has(path):
        raise DictlearnError(f"{files.where} has no {path!r}; it has {some(found or files.names)}.")
    if path in files.names:
        owner = place_of_file(files, path)
        return [path if owner is None else owner]
    below = [place for place in found if path == "" or place.startswith(f"{path}/")]
    if path in found or not below:
        return [path]
    if len(below) > 1:
        raise DictlearnError(
            f"{files.where} holds {len(below)} dictionaries{f' in {path}' if path else ''}: name the path of one, "
            f"or several with a '*'; {some(below)}."
        )
    return below


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _letters(name: str) -> str:
    """In the letters A-Z a-z 0-9 _ . -"""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


def _codecs() -> Mapping[str, Codec]:
    return {kind: cast(Codec, lookup(CODECS, kind)()) for kind in kinds(CODECS)}


def _found(codec: Codec, names: Sequence[str], *, named: bool) -> list[str]:
    return codec.find(names) + (codec.named(names) if named and isinstance(codec, NamingCodec) else [])


def _config(path: Path) -> Mapping[str, Any] | None:
    """A configuration of plain JSON values; None for other files."""
    if path.suffix not in (".json", ".yaml") or path.stat().st_size > MOST_BYTES:
        return None
    return read_json(path) if path.suffix == ".json" else read_yaml(path)

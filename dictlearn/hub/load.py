"""Load and save dictionaries in folders."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.codecs.base import Codec, read_json
from dictlearn.registry import kinds, lookup
from dictlearn.types import DictlearnError, FormatError

CODECS = "dictlearn.hub.codecs"
CHOICES = (
    "give a folder with cfg.json and weights, a run folder with dictionaries/*/cfg.json, or a quoted glob of either"
)


def load(ref: str | Path) -> Dictionary | dict[str, Dictionary]:
    """The dictionary in the folder `ref`; of a run folder (or a glob), all of them by name.

    Raises DictlearnError if there is nothing to load, FormatError if a folder is of no known format.
    """
    path = _path(ref)
    if "cfg.json" in _files(path):
        return _read(path)
    return {name: _read(folder) for name, folder in find(path).items()}


def find(refs: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """Dictionary folders by name: `refs` are dictionary folders, run folders, or globs of either.

    A name is the folder's; where two are equal, each is preceded by the folder of its run.
    Raises DictlearnError for a ref that holds no dictionary, and where two dictionaries would have one name.
    """
    several = [refs] if isinstance(refs, str | Path) or not isinstance(refs, Sequence) else refs
    if not several:
        raise DictlearnError(f"The list of dictionaries to find is empty: {CHOICES}.")
    folders: list[Path] = []
    for ref in several:
        folders += [folder for folder in _expand(_path(ref)) if folder not in folders]
    names = [folder.name for folder in folders]
    unique = {f: f.name if names.count(f.name) == 1 else f"{_run_name(f)}_{f.name}" for f in folders}
    if len(set(unique.values())) < len(folders):
        raise DictlearnError(f"Two dictionaries would have the same name: {sorted(map(str, folders))}.")
    return {name: folder for folder, name in unique.items()}


def save(dictionary: Dictionary, folder: str | Path) -> None:
    """Write an inference dictionary in the native format."""
    cast(Codec, lookup(CODECS, "native")()).write(dictionary, Path(folder))


def _path(ref: object) -> Path:
    if not isinstance(ref, str | Path):
        raise DictlearnError(f"A dictionary is named by a path, got {ref!r} ({type(ref).__name__}): {CHOICES}.")
    if not str(ref).strip():
        raise DictlearnError(f"A dictionary is named by a path, got an empty one: {CHOICES}.")
    return Path(ref)


def _expand(ref: Path) -> list[Path]:
    if ref.is_file():
        raise DictlearnError(f"{str(ref)!r} is a file, and a dictionary is a folder of files: {CHOICES}.")
    paths = [ref] if ref.exists() else [Path(path) for path in sorted(glob.glob(str(ref)))]  # noqa: PTH207
    folders: list[Path] = []
    for path in paths:
        if "cfg.json" in _files(path):
            folders.append(path.resolve())
        else:
            folders += [p.parent.resolve() for p in sorted((path / "dictionaries").glob("*/cfg.json"))]
    if not folders:
        found = "holds no dictionary" if paths else "does not exist, so it holds no dictionary"
        raise DictlearnError(f"{str(ref)!r} {found}: {CHOICES}.")
    return folders


def _run_name(folder: Path) -> str:
    return (folder.parent.parent if folder.parent.name == "dictionaries" else folder.parent).name


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _read(folder: Path) -> Dictionary:
    files = _files(folder)
    cfg = read_json(folder / "cfg.json") if "cfg.json" in files else {}
    codecs = {kind: cast(Codec, lookup(CODECS, kind)()) for kind in kinds(CODECS)}
    matching = [kind for kind, codec in codecs.items() if codec.matches(files, cfg)]
    if len(matching) != 1:
        found = f"matches {matching}" if matching else f"matches none of {sorted(codecs)}"
        raise FormatError(f"{folder} must be of exactly one known format; it {found}. Files: {sorted(files)}.")
    return codecs[matching[0]].read(folder)

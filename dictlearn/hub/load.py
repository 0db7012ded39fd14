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


def load(ref: str | Path) -> Dictionary | dict[str, Dictionary]:
    """The dictionary in the folder `ref`; of a run folder (or a glob), all of them by name.

    Raises DictlearnError if there is nothing to load, FormatError if a folder is of no known format.
    """
    if "cfg.json" in _files(Path(ref)):
        return _read(Path(ref))
    return {name: _read(folder) for name, folder in find(ref).items()}


def find(refs: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """Dictionary folders by name: `refs` are dictionary folders, run folders, or globs of either.

    A name is the folder's; where two are equal, each is preceded by the folder of its run.
    """
    folders: list[Path] = []
    for ref in [refs] if isinstance(refs, str | Path) else refs:
        folders += [folder for folder in _expand(str(ref)) if folder not in folders]
    names = [folder.name for folder in folders]
    unique = {f: f.name if names.count(f.name) == 1 else f"{_run_name(f)}_{f.name}" for f in folders}
    if len(set(unique.values())) < len(folders):
        raise DictlearnError(f"Two dictionaries would have the same name: {sorted(map(str, folders))}.")
    return {name: folder for folder, name in unique.items()}


def save(dictionary: Dictionary, folder: str | Path) -> None:
    """Write an inference dictionary in the native format."""
    cast(Codec, lookup(CODECS, "native")()).write(dictionary, Path(folder))


def _expand(ref: str) -> list[Path]:
    paths = [Path(ref)] if Path(ref).exists() else [Path(path) for path in sorted(glob.glob(ref))]  # noqa: PTH207
    folders: list[Path] = []
    for path in paths:
        if "cfg.json" in _files(path):
            folders.append(path.resolve())
        else:
            folders += [p.parent.resolve() for p in sorted((path / "dictionaries").glob("*/cfg.json"))]
    if not folders:
        raise DictlearnError(
            f"{ref!r} holds no dictionary: give a folder with cfg.json and weights, a run folder with "
            f"dictionaries/*/cfg.json, or a quoted glob of either."
        )
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

"""Load and save dictionaries: in local folders, and from repositories of the Hugging Face Hub."""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.codecs.base import Codec, WritingCodec
from dictlearn.hub.files import Files, hub_files, local_files
from dictlearn.hub.refs import parse
from dictlearn.registry import kinds, lookup
from dictlearn.types import DictlearnError, FormatError

CODECS = "dictlearn.hub.codecs"
CHOICES = (
    "give a folder with cfg.json and weights, a run folder with dictionaries/*/cfg.json, or a quoted glob of either"
)
MOST_NAMED = 20  # places in a message


def load(ref: str | Path) -> Dictionary | dict[str, Dictionary]:
    """The dictionary in the folder `ref`; of a run folder (or a glob), all of them by name.

    `ref` may be on the Hub: `user/repository:path/in/it@revision`, of which only the files needed are downloaded.

    Raises DictlearnError if there is nothing to load, FormatError if files are of no known format.
    """
    path = _path(ref)
    if not path.exists() and _on_the_hub(str(ref)):
        hub_ref = parse(str(ref))
        files = hub_files(hub_ref)
        return _read(files, _one_place(files, hub_ref.path))
    if path.is_file() and path.name in _places(files := local_files(path.parent)):
        return _read(files, path.name)
    if path.is_dir() and not (path / "dictionaries").is_dir():
        files = local_files(path)
        if _places(files) or (path / "cfg.json").exists():
            return _read(files, _one_place(files, ""))
    return {name: _read(local_files(folder), "") for name, folder in find(path).items()}


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
    cast(WritingCodec, lookup(CODECS, "native")()).write(dictionary, Path(folder))


def _path(ref: object) -> Path:
    if not isinstance(ref, str | Path):
        raise DictlearnError(f"A dictionary is named by a path, got {ref!r} ({type(ref).__name__}): {CHOICES}.")
    if not str(ref).strip():
        raise DictlearnError(f"A dictionary is named by a path, got an empty one: {CHOICES}.")
    return Path(ref)


def _on_the_hub(ref: str) -> bool:
    """Whether `ref`, which is nothing on disk, can be a place on the Hub."""
    try:
        parse(ref)
    except DictlearnError:
        return False
    return True


def _expand(ref: Path) -> list[Path]:
    if ref.is_file():
        raise DictlearnError(f"{str(ref)!r} is a file, and a dictionary is a folder of files: {CHOICES}.")
    paths = [ref] if ref.exists() else [Path(path) for path in sorted(glob.glob(str(ref)))]  # noqa: PTH207
    folders: list[Path] = []
    for path in paths:
        if (path / "cfg.json").is_file():
            folders.append(path.resolve())
        else:
            folders += [p.parent.resolve() for p in sorted((path / "dictionaries").glob("*/cfg.json"))]
    if not folders:
        found = "holds no dictionary" if paths else "does not exist, so it holds no dictionary"
        raise DictlearnError(f"{str(ref)!r} {found}: {CHOICES}.")
    return folders


def _run_name(folder: Path) -> str:
    return (folder.parent.parent if folder.parent.name == "dictionaries" else folder.parent).name


def _codecs() -> dict[str, Codec]:
    return {kind: cast(Codec, lookup(CODECS, kind)()) for kind in kinds(CODECS)}


def _places(files: Files) -> list[str]:
    """Where dictionaries are, as far as the names of the files tell."""
    return sorted({place for codec in _codecs().values() for place in codec.find(files.names)})


def _one_place(files: Files, path: str) -> str:
    """`path`, or the only place of a dictionary below it."""
    if not files.has(path):
        raise DictlearnError(f"{files.where} has no {path!r}; it has {_some(files.names)}.")
    found = _places(files)
    below = [place for place in found if path == "" or place.startswith(f"{path}/")]
    if path in found or not below:
        return path
    if len(below) > 1:
        raise DictlearnError(
            f"{files.where} holds {len(below)} dictionaries{f' in {path}' if path else ''}: name the path of one, "
            f"{_some(below)}."
        )
    return below[0]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _read(files: Files, place: str) -> Dictionary:
    codecs = _codecs()
    matching = [
        k for k, codec in codecs.items() if place in codec.find(files.names) and codec.matches(files, place)
    ]
    if len(matching) != 1:
        inside = [name for name in files.names if posixpath.dirname(name) == place or name == place]
        looked_for = "; ".join(f"{kind}: {codec.layout}" for kind, codec in codecs.items())
        found = f"it is {' and '.join(matching)}" if matching else "it is none"
        raise FormatError(
            f"{files.place(place) if place else files.where} must be of exactly one known format; {found}. Looked "
            f"for: {looked_for}. Files: {_some(inside)}."
        )
    dictionary = codecs[matching[0]].read(files, place)
    if files.source:
        dictionary.metadata = {**dictionary.metadata, "source": {**files.source, "path": place}}
    return dictionary

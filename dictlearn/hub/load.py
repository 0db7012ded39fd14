"""Load and save dictionaries: in local folders, and from repositories of the Hugging Face Hub."""

from __future__ import annotations

import difflib
import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from dictlearn.checks import check_choice
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.codecs.base import WritingCodec
from dictlearn.hub.files import expanded, hub_files, local_files
from dictlearn.hub.places import CODECS, NATIVE, Place, is_pattern, place_of_file, places, places_at
from dictlearn.hub.refs import HubRef, parse
from dictlearn.hub.releases import RELEASES, place_of, published_l0, split_alias
from dictlearn.registry import kinds, lookup
from dictlearn.types import DictlearnError

CHOICES = (
    "give a folder with cfg.json and weights, a run folder with dictionaries/*/cfg.json, or a quoted glob of either"
)


def load(
    ref: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Dictionary | dict[str, Dictionary]:
    """The dictionary that `ref` names, frozen, for inference; where it names several, all of them by name.

    Args:
        ref: a folder or file on disk; a run folder, or a glob of folders, for all dictionaries there;
            `user/repository:path/in/it@revision` on the Hub, of which only the files needed are downloaded (a path
            with a `*` is for all that match); or `release/id`, such as `gpt2-small-res-jb/8`.
        device, dtype: of the weights; what they are computed from is float32.

    `reads` and `writes` are its sites. `metadata` has what the files say: `lm_name` (the Hub's id), `lm_revision`,
    `modules` (of the sites, below the base model), `ctx`, `prepend_bos`, `published_l0` and `source` (repository or
    folder, path, revision, format, original configuration).

    Raises DictlearnError if there is nothing to load, FormatError if files are of no known format.
    """
    if not dtype.is_floating_point:
        raise DictlearnError(f"dtype must be a floating type such as torch.bfloat16, got {dtype}.")
    found = _places(_path(ref))
    if isinstance(found, Place):
        return found.read().to(device=device, dtype=dtype)
    return {name: place.read().to(device=device, dtype=dtype) for name, place in _named(found).items()}


def locate(refs: str | Path | Sequence[str | Path]) -> dict[str, Place]:
    """The dictionaries that references name, not read yet, by names that are unique among them.

    Raises DictlearnError for a reference that names none, and where two dictionaries would have one name.
    """
    several = [refs] if isinstance(refs, str | Path) or not isinstance(refs, Sequence) else refs
    if not several:
        raise DictlearnError(f"The list of dictionaries to find is empty: {CHOICES}.")
    found = [_places(_path(ref)) for ref in several]
    listed = [place for own in found for place in ([own] if isinstance(own, Place) else own)]
    return _named(list({place.full_name: place for place in listed}.values()))


def list_dictionaries(ref: str | Path) -> list[str]:
    """References to the dictionaries in a repository of the Hub, of a release, or below a folder, by file names;
    checkpoints of a training are not among them.

    Raises DictlearnError where it does not exist or holds none.
    """
    path = _path(ref)
    if path.is_dir():
        named = [str(path / place) for place in places(local_files(path))]
    else:
        name, _, below = str(ref).partition("/")
        hub_ref = HubRef(RELEASES[name].repo, below) if name in RELEASES else parse(str(ref))
        named = [
            str(HubRef(hub_ref.repo, place, hub_ref.revision))
            for place in places(hub_files(hub_ref))
            if f"{place}/".startswith(f"{hub_ref.path}/" if hub_ref.path else "")
        ]
    if not named:
        raise DictlearnError(f"{str(ref)!r} holds no dictionary of a known format.")
    return named


def save(dictionary: Dictionary, folder: str | Path, format: str = NATIVE) -> None:
    """Write an inference dictionary into `folder`, in the files of `format`: one of the codecs that write.

    Raises DictlearnError where that format has no dictionaries of this kind; the native one has all.
    """
    codecs = {kind: lookup(CODECS, kind)() for kind in kinds(CODECS)}
    writing = {kind: codec for kind, codec in codecs.items() if isinstance(codec, WritingCodec)}
    check_choice("format", format, tuple(writing))
    writing[format].write(dictionary, expanded(folder))


def _path(ref: object) -> Path:
    if not isinstance(ref, str | Path):
        raise DictlearnError(f"A dictionary is named by a path, got {ref!r} ({type(ref).__name__}): {CHOICES}.")
    if not str(ref).strip():
        raise DictlearnError(f"A dictionary is named by a path, got an empty one: {CHOICES}.")
    return expanded(ref)


def _places(ref: Path) -> Place | list[Place]:
    """What a reference names: a dictionary, or a list of them where it is a run folder or a pattern."""
    if not ref.exists() and (found := _on_the_hub(str(ref))) is not None:
        return found
    several = not ref.exists() or (ref / "dictionaries").is_dir()
    paths = [ref] if ref.exists() else [Path(path) for path in sorted(glob.glob(str(ref)))]  # noqa: PTH207
    if found := [place for path in paths for place in _on_disk(path, named=ref.exists())]:
        return found if several else found[0]
    if ref.is_file():
        raise DictlearnError(f"{str(ref)!r} is a file that no known dictionary needs: {CHOICES}.")
    why = "holds no dictionary" if paths else "does not exist, so it holds no dictionary"
    raise DictlearnError(f"{str(ref)!r} {why}: {CHOICES}.")


def _on_disk(path: Path, *, named: bool) -> list[Place]:
    """Those of a run folder; the one of another folder, or of a file; where no pattern has named it that of any of
    its files. DictlearnError where there are more.
    """
    if path.is_file():
        folder = path.parents[path.parent.name == "checkpoints"]  # their configuration is above
        files, name = local_files(folder), path.relative_to(folder).as_posix()
        found = place_of_file(files, name) if named else name if name in places(files) else None
        return [] if found is None else [Place(files, found)]
    if (path / "dictionaries").is_dir():
        return [Place(local_files(cfg.parent), "") for cfg in sorted((path / "dictionaries").glob("*/cfg.json"))]
    files = local_files(path)
    known = places(files) or (path / "cfg.json").is_file()
    return [Place(files, place) for place in places_at(files, "")] if known else []


def _on_the_hub(ref: str) -> Place | list[Place] | None:
    """None for what can be no place on the Hub."""
    if alias := split_alias(ref):
        release, given = alias
        files = hub_files(HubRef(RELEASES[release].repo))
        path = place_of(release, given, places(files, named=not is_pattern(given)))
        return Place(files, path, published_l0(release, given, path))
    try:
        hub_ref = parse(ref)
    except DictlearnError:
        return None
    try:
        files = hub_files(hub_ref)
    except DictlearnError as error:
        close = difflib.get_close_matches(hub_ref.repo.partition("/")[0], RELEASES, n=3, cutoff=0.8)
        if not close:
            raise
        raise DictlearnError(f"{error} Did you mean the release {' or '.join(close)}?") from error
    found = [Place(files.anew(), path) for path in places_at(files, hub_ref.path)]
    return found if is_pattern(hub_ref.path) else found[0]


def _named(found: Sequence[Place]) -> dict[str, Place]:
    """By name; where two are equal, each is preceded by the name of its run or repository."""
    counts = Counter(place.name for place in found)
    named = {place.name if counts[place.name] == 1 else place.long_name: place for place in found}
    if len(named) < len(found):
        listed = ", ".join(sorted(place.full_name for place in found))
        raise DictlearnError(f"Two dictionaries would have the same name: {listed}.")
    return named

"""Publish dictionaries: their files, a model card and a manifest, in one commit to a repository of the Hub."""

from __future__ import annotations

import logging
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.branch import CARD, Held, commit, open_branch, writer
from dictlearn.hub.card import Facts, facts, readme
from dictlearn.hub.codecs.native import CONFIG, WEIGHTS
from dictlearn.hub.files import expanded, hub_files
from dictlearn.hub.load import load, locate
from dictlearn.hub.manifest import MANIFEST, merged, read_lines, rows, sha256, text_of
from dictlearn.hub.places import Place
from dictlearn.hub.refs import HubRef, parse
from dictlearn.hub.weights import read_json
from dictlearn.types import DictlearnError, FormatError

log = logging.getLogger(__name__)

REPORT = "report.json"
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


class Pushed(NamedTuple):
    """What was uploaded: `sizes` in bytes by path; `refs` for `dictlearn.load`.

    A dry run makes no commit: `oid` and `url` are None, and the refs name none.
    """

    refs: tuple[str, ...]
    sizes: dict[str, int]
    oid: str | None = None
    url: str | None = None


class _Checked(NamedTuple):
    """A dictionary that can be published."""

    local: Place
    additions: list[CommitOperationAdd]
    facts: Facts
    private: list[str]  # paths of this computer that its files name


def push(
    folder: str | Path,
    repo: str,
    path: str = "",
    *,
    branch: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Upload the dictionary in `folder` to `path` in `repo`; of a run folder all of them, to `path/NAME`.

    One commit has cfg.json, sae_weights.safetensors and, where there is one, report.json of each dictionary, the
    card README.md and manifest.jsonl. What else is in the repository stays. One dictionary is then loaded back
    from the commit and compared bit by bit. Repository (private if `private`) and `branch` are made where there
    are none. `dry_run` prints what would be uploaded to a new repository, without any request.

    Raises DictlearnError, before anything is uploaded, for a name or a folder that cannot be published and where
    the Hub does not let us; afterwards, where what it gives back is not what was sent.
    """
    target = _target(repo, path, branch)
    found = {place: _checked(place, local) for place, local in _places(folder, path).items()}
    for place, checked in found.items():
        if checked.private:
            named = ", ".join(checked.private)
            log.warning("The files of %s name paths of this computer: %s", place or repo, named)
    if dry_run:
        additions = _additions(target, found, Held(), [])
        sys.stdout.write(_listing(target, additions))
        return _pushed(target, found, additions, None)
    api = writer(target)
    held = open_branch(api, target, private)
    gone = [name for place, one in found.items() if (name := _old_report(place, one)) in held.names]
    additions = _additions(target, found, held, gone)
    made = commit(api, target, held, additions, gone, f"Dictionaries: {', '.join(p or '.' for p in found)}")
    place = min(found)
    _compare(HubRef(target.repo, place, made.oid), found[place], made)
    return _pushed(target, found, additions, made)


def _target(repo: str, path: str, branch: str | None) -> HubRef:
    """The root of the branch."""
    try:
        validate_repo_id(repo)
        plain = parse(repo) == HubRef(repo)
    except (HFValidationError, DictlearnError, TypeError):
        plain = False
    if not plain:
        raise DictlearnError(
            "repo must be 'user/repository', of letters, digits, '-', '_' and '.'; path and branch are given by "
            f"themselves; got {repo!r}."
        )
    if path != "" and not (isinstance(path, str) and NAME.fullmatch(path)):
        raise DictlearnError(
            "path must be a folder in the repository, like 'layer_8/width_16k', of letters, digits, '_', '-' and "
            f"'.', no part of it starting with '.' or '-'; got {path!r}."
        )
    if branch is not None and not (isinstance(branch, str) and NAME.fullmatch(branch)):
        raise DictlearnError(f"branch must be the name of a branch, like 'v2', got {branch!r}.")
    return HubRef(repo, "", branch)


def _places(folder: str | Path, path: str) -> dict[str, Place]:
    """The dictionaries of `folder`, by where each goes."""
    if not isinstance(folder, str | Path) or not (given := expanded(folder)).is_dir():
        raise DictlearnError(f"What is published is a folder of a dictionary or of a run, got {str(folder)!r}.")
    found = locate(given)
    if (given / CONFIG).is_file() or not (given / "dictionaries").is_dir():
        (only,) = found.values()
        return {path: only}
    if odd := [name for name in found if not NAME.fullmatch(name)]:
        raise DictlearnError(f"Folders of dictionaries are named by letters, digits, '_', '-' and '.', got {odd}.")
    return {posixpath.join(path, name): local for name, local in found.items()}


def _checked(place: str, local: Place) -> _Checked:
    inside = {name: posixpath.join(local.path, name) for name in (CONFIG, WEIGHTS, REPORT)}
    files = {name: local.files.path(file) for name, file in inside.items() if file in local.files.names}
    config = read_json(files[CONFIG]) if CONFIG in files else {}
    if WEIGHTS not in files or "architecture" not in config:
        raise FormatError(
            f"{local.files.where} is not in the native format, {CONFIG} beside {WEIGHTS}: write it by "
            "`dictlearn.hub.save(dictlearn.load(FOLDER), NEW_FOLDER)`."
        )
    dictionary = local.read()
    report = read_json(files[REPORT]) if REPORT in files else {}
    additions = {name: CommitOperationAdd(posixpath.join(place, name), str(file)) for name, file in files.items()}
    evaluated = report.get("dictionary")
    measured = evaluated.get("sha256") if isinstance(evaluated, Mapping) else None
    if measured is not None and measured != sha256(additions[WEIGHTS]):
        raise DictlearnError(f"{files[REPORT]} is of other weights than {WEIGHTS} beside it: evaluate again.")
    private = sorted({*_own_paths(config), *_own_paths(report)})
    return _Checked(local, [*additions.values()], facts(dictionary, config, report), private)


def _own_paths(value: Any) -> Iterator[str]:
    if isinstance(value, str) and (value.startswith("~/") or Path(value).is_absolute()):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _own_paths(inner)


def _old_report(place: str, checked: _Checked) -> str | None:
    """The report of what was there before, unless there is a new one."""
    name = posixpath.join(place, REPORT)
    return None if name in {addition.path_in_repo for addition in checked.additions} else name


def _additions(
    target: HubRef, found: Mapping[str, _Checked], held: Held, gone: list[str]
) -> list[CommitOperationAdd]:
    """All files to upload, with the manifest and the card of all dictionaries that are there then."""
    additions = [addition for checked in found.values() for addition in checked.additions]
    lines = merged(held.lines, held.names - {*gone}, additions)
    for place, checked in found.items():
        lines[posixpath.join(place, WEIGHTS)]["dictionary"] = checked.facts
    additions.append(CommitOperationAdd(MANIFEST, text_of(lines).encode()))
    card = readme(held.card, target, rows(lines))
    if card is None:
        log.warning("%s of %s stays as it is: dictlearn.push did not write it.", CARD, target.repo)
        return additions
    return [*additions, CommitOperationAdd(CARD, card.encode())]


def _compare(ref: HubRef, sent: _Checked, made: CommitInfo) -> None:
    """Load one back; DictlearnError, and the download is forgotten, unless it is what was sent."""
    names = [addition.path_in_repo for addition in sent.additions]
    try:
        problem = _difference(ref, names, sent.local.read())
    except DictlearnError as error:
        problem = f"it cannot be loaded back: {error}"
    if problem is None:
        return
    for name in names:
        if isinstance(cached := try_to_load_from_cache(ref.repo, name, revision=ref.revision), str):
            Path(cached).resolve().unlink(missing_ok=True)
            Path(cached).unlink(missing_ok=True)
    place = ref.path or "the dictionary"
    raise DictlearnError(
        f"{ref.repo} now has the commit {made.commit_url}, but {place} in it is not what was sent: {problem} Push "
        "again, or go back to the commit before."
    )


def _difference(ref: HubRef, names: list[str], local: Dictionary) -> str | None:
    """What of the dictionary at `ref` is not as in `local`, or its files not as in the manifest there."""
    loaded = load(str(ref))
    assert isinstance(loaded, Dictionary)  # the ref is of one
    there, here = dict(loaded.named_parameters()), dict(local.named_parameters())
    if differing := sorted(k for k in {*there, *here} if not _bit_equal(there.get(k), here.get(k))):
        return f"{', '.join(differing)} came back with other values."
    files = hub_files(HubRef(ref.repo, "", ref.revision))
    lines = read_lines(files.path(MANIFEST).read_text(encoding="utf-8"), files.place(MANIFEST))
    stated = {name: line.get("sha256") for name, line in lines.items()}
    wrong = [n for n in names if sha256(CommitOperationAdd(n, str(files.path(n)))) != stated.get(n)]
    return f"{', '.join(wrong)} came back with another sha256 than in {MANIFEST}." if wrong else None


def _bit_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(tensor.detach().flatten().view(torch.uint8) for tensor in (a, b)))


def _pushed(
    target: HubRef, found: Mapping[str, _Checked], additions: list[CommitOperationAdd], made: CommitInfo | None
) -> Pushed:
    oid, url = (made.oid, made.commit_url) if made else (None, None)
    refs = tuple(str(HubRef(target.repo, place, oid or target.revision)) for place in found)
    return Pushed(refs, {a.path_in_repo: a.upload_info.size for a in additions}, oid, url)


def _listing(target: HubRef, additions: list[CommitOperationAdd]) -> str:
    """What a dry run prints."""
    width = max(len(a.path_in_repo) for a in additions)
    lines = [f"{a.path_in_repo:{width}}  {a.upload_info.size:>15,d} bytes" for a in additions]
    (card,) = (a.path_or_fileobj for a in additions if a.path_in_repo == CARD)
    assert isinstance(card, bytes)
    return "\n".join([f"To a new repository {target}:", *lines, "", f"{CARD}:", "", card.decode()])

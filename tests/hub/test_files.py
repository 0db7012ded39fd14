"""Files of dictionaries on disk and on the Hub, with the genuine client and a local server."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import dictlearn
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub import files as files_module
from dictlearn.hub import save
from dictlearn.hub.files import hub_files, local_files
from dictlearn.hub.refs import HubRef
from dictlearn.types import DictlearnError, FormatError
from tests.hub.server import COMMIT, Hub, Repository, hub, use

CONTENT = bytes(range(256)) * 64
TINY = Repository({"layer_1/numbers.bin": CONTENT, "README.md": b"tiny"})
REPOSITORIES = {
    "someone/tiny": TINY,
    "someone/gated": Repository({}, refuses=(403, "GatedRepo")),
    "someone/closed": Repository({}, refuses=(401, "GatedRepo")),
    "someone/down": Repository({}, refuses=(503, "")),
    "someone/dropped": Repository({"a.bin": CONTENT}, drops="a.bin"),
    "someone/outside": Repository({"../../../secret/params.npz": CONTENT}),
    "someone/lying": Repository({"a.bin": CONTENT, "b.bin": CONTENT}, lies="a.bin"),
    "someone/false": Repository({"a.json": b"{}", "b.json": b"{}"}, lies="a.json"),
}


def published(folder: Path) -> Repository:
    """Two dictionaries, in folders `a` and `deep/b`."""
    for place in ("a", "deep/b"):
        save(Linear.tiny().for_inference(), folder / place)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return Repository({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and an empty download cache."""
    with hub({**REPOSITORIES, "someone/two": published(tmp_path / "published")}) as running:
        use(running, monkeypatch, tmp_path / "cache")
        yield running


def test_a_repository_is_read_file_by_file(server: Hub) -> None:
    found = hub_files(HubRef("someone/tiny"))
    assert found.names == ("README.md", "layer_1/numbers.bin")
    assert found.source == {"repo": "someone/tiny", "revision": COMMIT}
    assert [r for r in server.requests if "tiny" in r] == ["GET /api/models/someone/tiny"]
    assert found.path("layer_1/numbers.bin").read_bytes() == CONTENT
    assert not any("README" in request for request in server.requests)
    n_requests = len(server.requests)
    assert found.path("layer_1/numbers.bin").read_bytes() == CONTENT
    assert len(server.requests) == n_requests, "a file in the cache is asked for again"


def test_offline_the_cache_is_what_there_is(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_files(HubRef("someone/tiny")).path("layer_1/numbers.bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    n_requests = len(server.requests)
    for revision in (None, COMMIT):
        found = hub_files(HubRef("someone/tiny", "", revision))
        assert found.names == ("layer_1/numbers.bin",)
        assert found.source["revision"] == COMMIT
        assert found.path("layer_1/numbers.bin").read_bytes() == CONTENT
    assert len(server.requests) == n_requests
    with pytest.raises(DictlearnError, match="someone/tiny@v9 is no file here and not in the download cache"):
        hub_files(HubRef("someone/tiny", "", "v9"))
    with pytest.raises(DictlearnError, match="someone/dropped is no file here and not in the download cache"):
        hub_files(HubRef("someone/dropped"))


REFUSED = {
    HubRef("someone/none"): "There is no 'someone/none'",
    HubRef("someone/gated"): "someone/gated is gated: accept its licence",
    HubRef("someone/closed"): "someone/closed is gated: accept its licence",
    HubRef("someone/tiny", "", "v9"): "someone/tiny has no revision 'v9'",
    HubRef(
        "someone/down"
    ): "someone/down is no file here and not in the download cache .* cannot be reached: .*503",
}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("ref", REFUSED, ids=str)
def test_why_there_are_no_files(ref: HubRef) -> None:
    with pytest.raises(DictlearnError, match=REFUSED[ref]):
        hub_files(ref)


@pytest.mark.usefixtures("server")
def test_a_file_that_ends_half_way_is_no_file(tmp_path: Path) -> None:
    found = hub_files(HubRef("someone/dropped"))
    with pytest.raises(DictlearnError, match=re.escape("Cannot download a.bin of someone/dropped")):
        found.path("a.bin")
    assert not [path for path in (tmp_path / "cache").rglob("snapshots/*/*")]


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


HASHES: dict[str, tuple[str, bytes, Callable[[bytes], str]]] = {
    "sha256": ("bin", CONTENT, lambda content: hashlib.sha256(content).hexdigest()),
    "git's sha1": ("json", b"{}", git_sha1),
}


def test_a_small_file_has_the_hash_that_git_gives_it() -> None:
    assert git_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # of every empty file


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("kind", HASHES)
def test_a_file_of_another_hash_is_no_file(tmp_path: Path, kind: str) -> None:
    suffix, content, hash_of = HASHES[kind]
    repo = {"bin": "someone/lying", "json": "someone/false"}[suffix]
    found = hub_files(HubRef(repo))
    announced, is_one = hash_of(b"another"), hash_of(content)
    message = rf"a\.{suffix} of {repo} came with other content .*{kind} {is_one}, announced {announced}"
    with pytest.raises(DictlearnError, match=message):
        found.path(f"a.{suffix}")
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    assert not [path for path in kept if "snapshots" in path.parts or "blobs" in path.parts]
    assert found.path(f"b.{suffix}").read_bytes() == content


def test_a_file_in_the_cache_is_not_asked_for_again(server: Hub) -> None:
    hub_files(HubRef("someone/tiny")).path("layer_1/numbers.bin")
    n_requests = len(server.requests)
    again = hub_files(HubRef("someone/tiny"))
    assert again.path("layer_1/numbers.bin").read_bytes() == CONTENT
    assert server.requests[n_requests:] == ["GET /api/models/someone/tiny"]


@pytest.mark.usefixtures("server")
def test_no_other_file_is_asked_for() -> None:
    with pytest.raises(DictlearnError, match=r"someone/tiny has no file '\.\./secret'"):
        hub_files(HubRef("someone/tiny")).path("../secret")


@pytest.mark.usefixtures("server")
def test_a_name_that_leads_out_is_refused(tmp_path: Path) -> None:
    message = re.escape("Cannot download ../../../secret/params.npz of someone/outside: ")
    with pytest.raises(DictlearnError, match=message):
        dictlearn.load("someone/outside")
    assert not [path for path in tmp_path.rglob("params.npz")]


def test_a_dictionary_of_the_hub(server: Hub, tmp_path: Path) -> None:
    loaded = dictlearn.load("someone/two:a")
    assert isinstance(loaded, Linear)
    torch.testing.assert_close(loaded.W_dec, Linear.tiny().for_inference().W_dec)
    cfg = json.loads((tmp_path / "published/a/cfg.json").read_text())
    where = {"repo": "someone/two", "revision": COMMIT, "path": "a", "format": "native"}
    assert loaded.metadata["source"] == {**where, "config": {"a/cfg.json": cfg}}
    assert not any("/deep/" in request for request in server.requests)
    only = dictlearn.load(f"someone/two:deep@{COMMIT}")  # the only one in there
    assert isinstance(only, Linear)
    assert only.metadata["source"]["path"] == "deep/b"


def test_a_file_of_the_hub_stands_for_its_dictionary(server: Hub) -> None:
    loaded = dictlearn.load("someone/two:deep/b/sae_weights.safetensors")
    assert isinstance(loaded, Linear)
    assert loaded.metadata["source"]["path"] == "deep/b"
    assert not any("/a/" in request for request in server.requests)


@pytest.mark.usefixtures("server")
def test_which_dictionary_of_the_hub_is_asked_back() -> None:
    with pytest.raises(
        DictlearnError, match=r"someone/two holds 2 dictionaries: name the path of one, .*; a, deep/b"
    ):
        dictlearn.load("someone/two")
    with pytest.raises(DictlearnError, match=r"someone/two has no 'b'; it has a, deep/b"):
        dictlearn.load("someone/two:b")
    with pytest.raises(FormatError, match=r"someone/tiny.*exactly one known format; it is none.*README\.md"):
        dictlearn.load("someone/tiny")
    with pytest.raises(DictlearnError, match="There is no 'runs/nothing': no file here and no repository"):
        dictlearn.load("runs/nothing")


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "own" / "sub").mkdir(parents=True)
    (tmp_path / "own" / "sub" / "a").write_text("a")
    (tmp_path / "own" / ".git").mkdir()
    (tmp_path / "own" / ".git" / "b").write_text("b")
    (tmp_path / "secret").write_text("c")
    (tmp_path / "own" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "own" / "inner").symlink_to("sub/a")
    found = local_files(tmp_path / "own")
    assert found.names == ("inner", "link", "sub/a")
    assert found.path("sub/a").read_text() == found.path("inner").read_text() == "a"
    assert [found.has(place) for place in ("", "sub", "sub/a", "su", "b")] == [True, True, True, False, False]
    with pytest.raises(DictlearnError, match="a link that leads out of its folder"):
        found.path("link")
    with pytest.raises(DictlearnError, match="has no file"):
        found.path("../secret")


@pytest.mark.usefixtures("server")
def test_a_folder_of_the_download_cache_has_links_to_its_blobs() -> None:
    path = hub_files(HubRef("someone/tiny")).path("layer_1/numbers.bin")
    assert path.is_symlink()
    assert local_files(path.parent).path("numbers.bin").read_bytes() == CONTENT


def test_a_folder_of_far_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MOST_FILES", 2)
    for i in range(3):
        (tmp_path / str(i)).touch()
    with pytest.raises(DictlearnError, match="more than 2 files: name the dictionary's own folder"):
        local_files(tmp_path)

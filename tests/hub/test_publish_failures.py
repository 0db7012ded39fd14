"""What publishing refuses, and what it says and leaves behind where the Hub or the network end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import dictlearn
from dictlearn.hub.publish import push
from dictlearn.types import DictlearnError, FormatError
from tests.hub.publishing import REPO, assert_bit_equal, autoencoder, write
from tests.hub.server import Repository
from tests.hub.uploads import FIRST_COMMIT, WritableHub

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no user": ({"repo": "mine"}, "repo must be 'user/repository'.*got 'mine'"),
    "path in repo": ({"repo": "a/b:c"}, "path and branch are given by themselves; got 'a/b:c'"),
    "revision in repo": ({"repo": "a/b@c"}, "got 'a/b@c'"),
    "not the Hub's": ({"repo": "a/b--c"}, "got 'a/b--c'"),
    "up": ({"path": "a/../b"}, r"path must be a folder in the repository.*got 'a/\.\./b'"),
    "absolute": ({"path": "/a"}, "path must be.*got '/a'"),
    "hidden": ({"path": "a/.git"}, r"path must be.*got 'a/\.git'"),
    "spaces": ({"path": "a b"}, "path must be.*got 'a b'"),
    "branch": ({"branch": "a..b c"}, r"branch must be the name of a branch.*got 'a\.\.b c'"),
    "no folder": ({"folder": "nowhere/here"}, "is a folder of a dictionary or of a run, got 'nowhere/here'"),
    "no dictionary": ({"folder": "empty"}, "'empty' holds no dictionary"),
    "odd name": ({"folder": "odd"}, r"named by letters.*got \['-a'\]"),
    "broken": ({"folder": "broken"}, "sae_weights.safetensors is not a whole safetensors file"),
    "not finite": ({"folder": "nan"}, "W_dec has values that are not finite"),
    "other format": ({"folder": "other"}, r"other is not in the native format.*dictlearn\.hub\.save"),
    "other report": ({"folder": "report"}, r"report\.json is of other weights than sae_weights\.safetensors"),
    "cut report": ({"folder": "cut"}, r"report\.json is not valid JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_any_request(
    server: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("good", "broken", "nan", "other", "report", "cut", "odd/dictionaries/-a"):
        write(Path(name), autoencoder(), l0=1.0)
    Path("empty").mkdir()
    weights = "sae_weights.safetensors"
    Path("broken", weights).write_bytes(Path("good", weights).read_bytes()[:-9])
    tensors = load_file(Path("good", weights))
    tensors["W_dec"][0, 0] = torch.nan
    save_file(tensors, Path("nan", weights))
    Path("other", weights).rename(Path("other", "sae.safetensors"))
    Path("report", weights).write_bytes(Path("other", "sae.safetensors").read_bytes())
    Path("cut", "report.json").write_text("{")
    changed, message = REFUSED[case]
    with pytest.raises(DictlearnError, match=message):
        push(**{"folder": "good", "repo": REPO, **changed})
    assert not server.requests


ANSWERS = {
    "create": (403, "Cannot publish to someone/mine on .*may not write there: it needs write access"),
    "preupload": (403, "may not write there: it needs write access"),
    "batch": (404, "there is no such repository or branch, or the token does not see it"),
    "upload": (403, "may not write there"),
    "verify": (422, "422"),
    "yaml": (503, "Cannot publish"),
    "commit": (412, "somebody else has committed to it meanwhile: push again"),
}


@pytest.mark.parametrize("step", ANSWERS)
def test_answers_of_the_hub_that_end_it(server: WritableHub, tmp_path: Path, step: str) -> None:
    status, message = ANSWERS[step]
    server.refuses[step] = status
    with pytest.raises(DictlearnError, match=f"{message}.*Nothing was committed"):
        push(write(tmp_path / "a", autoencoder()), REPO, "a")
    if step != "create":
        assert server.repositories[REPO].revisions["main"] == FIRST_COMMIT


def test_without_the_right_token(server: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a", autoencoder())
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(
        DictlearnError, match="does not accept the token: log in with `hf auth login` or set HF_TOKEN"
    ):
        push(folder, REPO)
    monkeypatch.delenv("HF_TOKEN")
    server.requests.clear()
    with pytest.raises(
        DictlearnError, match=r"needs a token of http.* that may write: log in with `hf auth login`"
    ):
        push(folder, REPO)
    assert not server.requests
    assert REPO not in server.repositories


@pytest.mark.usefixtures("server")
def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a", autoencoder())
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DictlearnError, match=r"on http://127.0.0.1:1: .*refused.*Nothing was committed"):
        push(folder, REPO)


def test_a_connection_that_ends_while_weights_are_sent(server: WritableHub, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", autoencoder())
    server.drops.add("upload")
    with pytest.raises(DictlearnError, match=r"Cannot publish to someone/mine on http.*Nothing was committed"):
        push(folder, REPO, "a")
    assert set(server.files(REPO)) == {".gitattributes"}
    assert not server.objects
    server.drops.clear()
    push(folder, REPO, "a")


def test_a_connection_that_ends_while_the_commit_is_made(server: WritableHub, tmp_path: Path) -> None:
    server.drops.add("commit")
    with pytest.raises(DictlearnError, match=f"Whether it was committed: see {server.url}/{REPO}/commits/main"):
        push(write(tmp_path / "a", autoencoder()), REPO)


def test_somebody_else_commits_meanwhile(
    server: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "a", autoencoder())
    push(folder, REPO, "a")
    server.after["preupload"] = lambda: server.put(REPO, {"other": b""})
    with pytest.raises(DictlearnError, match=r"somebody else has committed to it meanwhile.*Nothing was committed"):
        push(folder, REPO, "b")
    assert set(server.files(REPO)) == {"other"}


def test_weights_that_are_damaged_on_the_way_are_noticed(server: WritableHub, tmp_path: Path) -> None:
    made = autoencoder()
    folder = write(tmp_path / "a", made)
    server.damages = True
    with pytest.raises(DictlearnError, match=f"now has the commit {server.url}/{REPO}/commit/.* not what was sent"):
        push(folder, REPO, "a")
    server.damages = False
    server.objects.clear()
    server.repositories[REPO].trees.clear()
    assert_bit_equal(dictlearn.load(push(folder, REPO, "a").refs[0]), made)


def test_a_file_that_is_not_as_in_the_manifest_is_noticed(server: WritableHub, tmp_path: Path) -> None:
    def damage() -> None:
        repository = server.repositories[REPO]
        repository.trees[repository.revisions["main"]] = {**server.files(REPO), "a/report.json": b"{}"}

    server.after["commit"] = damage
    with pytest.raises(
        DictlearnError, match=r"a/report\.json came back with another sha256 than in manifest\.jsonl"
    ):
        push(write(tmp_path / "a", autoencoder(), l0=1.0), REPO, "a")


def test_a_manifest_that_is_none(server: WritableHub, tmp_path: Path) -> None:
    files = {"manifest.jsonl": b'{"path": "a"}\n["b"]\n'}
    server.repositories[REPO] = Repository(files, {"main": FIRST_COMMIT, FIRST_COMMIT: FIRST_COMMIT})
    with pytest.raises(FormatError, match=r"manifest\.jsonl, line 2, is no JSON object with a path"):
        push(write(tmp_path / "a", autoencoder()), REPO)
    assert server.files(REPO) == files

"""SAELens before 0.2: pickles that are known, and refused with the reason."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import dictlearn
from dictlearn.hub.files import local_files
from dictlearn.hub.places import places_at
from dictlearn.types import DictlearnError, FormatError
from tests.hub import test_dictionary_learning, test_transcoder_circuits

NAMES = ["old.pkl.gz", "old.pkl", "old.pt", "sparse_autoencoder_gpt2-small_blocks.8.hook_resid_pre_24576.pt"]
REASON = "is not supported because"


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def write(folder: Path, name: str) -> None:
    """As it wrote them: the object of the configuration, which names its class, and the weights."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        save = test_transcoder_circuits.Save(patch, path.parent)
        cfg = save.config(is_transcoder=False, hook_point="blocks.8.hook_resid_pre")
        content = {"cfg": cfg, "state_dict": test_transcoder_circuits.tensors()}
        if name.endswith(".pt"):
            save(content, path.name)
        else:
            pickled = pickle.dumps({"cfg": cfg, "state_dict": None, "code": Code()})
            path.write_bytes(gzip.compress(pickled, mtime=0) if name.endswith(".gz") else pickled)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_with_the_reason(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, f"deep/{name}")
    for ref in (tmp_path, tmp_path / "deep", tmp_path / "deep" / name):
        with pytest.raises(FormatError, match=rf"{name}.* {REASON}"):
            dictlearn.load(ref)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES[:3])
def test_beside_other_files_it_has_to_be_named(tmp_path: Path, name: str) -> None:
    """There it may be anything, and the folder is what it is without it."""
    tensors = test_dictionary_learning.write(tmp_path, "AutoEncoder")
    write(tmp_path, name)
    test_dictionary_learning.check(tmp_path, "AutoEncoder", tensors)
    assert places_at(local_files(tmp_path), "*") == [""]
    with pytest.raises(FormatError, match=rf"{name}.* {REASON}"):
        dictlearn.load(tmp_path / name)


def test_several(tmp_path: Path) -> None:
    for name in ("a.pkl.gz", "b.pkl"):
        write(tmp_path, name)
    with pytest.raises(DictlearnError, match=r"holds 2 dictionaries: name the path of one, .*; a\.pkl\.gz, b\.pkl"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("content", [{"a": torch.ones(3)}, {"cfg": 1}])
def test_other_torch_files_are_of_no_known_format(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"a\.pt must be of exactly one known format; it is none"):
        dictlearn.load(tmp_path / "a.pt")

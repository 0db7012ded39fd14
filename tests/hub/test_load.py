"""The doors `load` and `locate`: what they open, and what they say of refs they cannot."""

import inspect
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub import load, locate, save
from dictlearn.types import DictlearnError, FormatError
from tests.hub import test_circuit_tracer, test_dictionary_learning, test_gemma_scope, test_llama_scope

# Without the tests' type checker, which would refuse these values before the door does.
DOORS: dict[str, Callable[[Any], Any]] = {"load": inspect.unwrap(load), "locate": inspect.unwrap(locate)}
CHOICES = "give a folder with cfg.json and weights, a run folder with dictionaries/.*, or a quoted glob of either"


def test_run_folders_globs_and_lists(tmp_path: Path) -> None:
    for run in ("one", "two"):
        for name in ("resid_post.2", "mlp_out.2"):
            save(Linear.tiny().for_inference(), tmp_path / run / "dictionaries" / name)
    loaded = dictlearn.load(tmp_path / "one")
    assert isinstance(loaded, dict)
    assert sorted(loaded) == ["mlp_out.2", "resid_post.2"]
    assert sorted(locate(str(tmp_path / "*"))) == [
        "one_mlp_out.2",
        "one_resid_post.2",
        "two_mlp_out.2",
        "two_resid_post.2",
    ]
    listed = [tmp_path / "one/dictionaries/mlp_out.2", tmp_path / "two/dictionaries/resid_post.2"]
    assert list(locate(listed)) == ["mlp_out.2", "resid_post.2"]


def test_a_folder_of_no_known_format(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(
        FormatError,
        match=r"must be of exactly one known format; it is none\. Looked for: .*native: cfg\.json with an",
    ):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (5, r"named by a path, got 5 \(int\)"),
        (True, r"named by a path, got True \(bool\)"),
        (None, r"named by a path, got None \(NoneType\)"),
        ({"a": 1}, r"named by a path, got {'a': 1} \(dict\)"),
        ("", "named by a path, got an empty one"),
        (" ", "named by a path, got an empty one"),
        ("nowhere", "'nowhere' does not exist, so it holds no dictionary"),
        ("run*/nothing*", r"'run\*/nothing\*' does not exist"),
        ("empty", "'empty' holds no dictionary"),
        ("one/notes.txt", "'one/notes.txt' is a file that no known dictionary needs"),
    ],
)
def test_refs_that_hold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str, ref: object, message: str
) -> None:
    save(Linear.tiny().for_inference(), tmp_path / "one")
    (tmp_path / "one" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DictlearnError, match=f"{message}.*{CHOICES}"):
        DOORS[door](ref)


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ([], "list of dictionaries to find is empty"),
        ((), "list of dictionaries to find is empty"),
        (["one", None], r"got None \(NoneType\)"),
        (["one", 3], r"got 3 \(int\)"),
        (["one", "nowhere"], "'nowhere' does not exist"),
        ([["one"]], r"got \['one'\] \(list\)"),
    ],
)
def test_lists_with_something_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refs: Any, message: str
) -> None:
    save(Linear.tiny().for_inference(), tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DictlearnError, match=f"{message}.*{CHOICES}"):
        DOORS["locate"](refs)


def test_load_takes_one_ref() -> None:
    with pytest.raises(DictlearnError, match=r"named by a path, got \['a', 'b'\] \(list\)"):
        DOORS["load"](["a", "b"])


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_file_of_a_folder_stands_for_the_dictionary(tmp_path: Path, name: str) -> None:
    save(Linear.tiny().for_inference(), tmp_path / "one")
    save(Linear.tiny().for_inference(), tmp_path / "one" / "below")
    loaded = dictlearn.load(tmp_path / "one" / name)
    assert isinstance(loaded, Linear)
    assert list(locate(tmp_path / "one" / name)) == ["one"]


def test_a_pattern_does_not_name_the_files_of_a_dictionary(tmp_path: Path) -> None:
    save(Linear.tiny().for_inference(), tmp_path / "one")
    save(Linear.tiny().for_inference(), tmp_path / "one" / "below")
    assert list(locate(str(tmp_path / "one" / "*"))) == ["below"]


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (test_gemma_scope.write, "params.npz"),
        (partial(test_dictionary_learning.write, kind="AutoEncoder"), "ae.pt"),
        (test_llama_scope.write, "checkpoints/final.safetensors"),
        (test_llama_scope.write, "hyperparams.json"),
    ],
)
def test_files_of_other_formats(tmp_path: Path, write: Callable[[Path], Any], name: str) -> None:
    write(tmp_path / "one")
    loaded, same = dictlearn.load(tmp_path / "one" / name), dictlearn.load(tmp_path / "one")
    assert isinstance(loaded, Dictionary)
    assert isinstance(same, Dictionary)
    assert torch.equal(loaded.W_enc, same.W_enc)


def test_a_file_of_several_dictionaries(tmp_path: Path) -> None:
    test_circuit_tracer.write(tmp_path)
    shutil.copy(tmp_path / "layer_3.safetensors", tmp_path / "layer_4.safetensors")
    message = "config.yaml is of 2 dictionaries: name the path of one; layer_3.safetensors, layer_4.safetensors"
    with pytest.raises(DictlearnError, match=re.escape(message)):
        dictlearn.load(tmp_path / "config.yaml")


def test_a_path_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(Linear.tiny().for_inference(), "~/one")
    assert (tmp_path / "one" / "cfg.json").is_file()
    assert isinstance(dictlearn.load("~/one"), Linear)
    assert dictlearn.list(Path("~/one")) == [str(tmp_path / "one")]
    assert list(locate("~/o*")) == ["one"]
    with pytest.raises(DictlearnError, match="'~nobody_of_this_name/one' does not exist"):
        dictlearn.load("~nobody_of_this_name/one")


def test_two_dictionaries_of_one_name_are_refused(tmp_path: Path) -> None:
    for above in ("a", "b"):
        save(Linear.tiny().for_inference(), tmp_path / above / "run" / "dictionaries" / "x")
    with pytest.raises(DictlearnError, match="Two dictionaries would have the same name"):
        locate(str(tmp_path / "*" / "run"))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    save(Linear.tiny().for_inference(), tmp_path)
    (tmp_path / "cfg.json").write_text("{broken")
    with pytest.raises(FormatError, match=r"cfg.json is not valid JSON: .* line 1 column 2"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("format", ["sae_lens", "gemma_scope", "", None])
def test_formats_that_are_not_written(tmp_path: Path, format: Any) -> None:
    written = "circuit_tracer, circuit_tracer_clt, dictionary_learning, native, sparsify"
    with pytest.raises(DictlearnError, match=f"format must be one of {written}, got"):
        inspect.unwrap(save)(Linear.tiny().for_inference(), tmp_path, format=format)

"""Aliases of releases, several dictionaries of a repository at once, and lists of what one holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub import locate, save
from dictlearn.hub.refs import parse
from dictlearn.hub.releases import RELEASES, place_of, published_l0, split_alias
from dictlearn.types import DictlearnError
from tests.hub.server import COMMIT, Hub, Repository, hub

GEMMA = ("layer_12/width_16k/average_l0_{}", "layer_12/width_65k/average_l0_{}")
SCOPE = tuple(folder.format(l0) for folder in GEMMA for l0 in (22, 41, 82, 176, 445))


@pytest.mark.parametrize(
    ("ref", "places", "expected"),
    [
        ("gpt2-small-res-jb/8", [f"blocks.{n}.hook_resid_pre" for n in (8, 9)], "blocks.8.hook_resid_pre"),
        ("gpt2-small-res-jb/blocks.9.hook_resid_pre", ["blocks.9.hook_resid_pre"], "blocks.9.hook_resid_pre"),
        (
            "gpt2-small-mlp-tm/11",
            [f"sae_group_gpt2_blocks.{n}.hook_mlp_out_24576:v{v}" for n, v in ((1, 0), (11, 2))],
            "sae_group_gpt2_blocks.11.hook_mlp_out_24576:v2",
        ),
        (
            "gpt2-small-hook-z-kk/1",
            ["gpt2-small_L1_Hcat_z_lr1.pt", "gpt2-small_L10_Hcat_z_lr1.pt"],
            "gpt2-small_L1_Hcat_z_lr1.pt",
        ),
        ("gpt2-small-resid-post-v5-32k/1", ["v5_32k_layer_1.pt", "v5_32k_layer_2.pt"], "v5_32k_layer_1.pt"),
        ("gemma-scope-2b-pt-res-canonical/12", SCOPE, "layer_12/width_16k/average_l0_82"),
        (
            "gemma-scope-2b-pt-res-canonical/layer_12/width_65k/canonical",
            SCOPE,
            "layer_12/width_65k/average_l0_82",
        ),
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_22", SCOPE, "layer_12/width_16k/average_l0_22"),
        (  # as far from 100 as the other one: the larger, as the field's registry has it
            "gemma-scope-9b-pt-att-canonical/27",
            [f"layer_27/width_16k/average_l0_{n}" for n in (18, 33, 64, 136, 306)],
            "layer_27/width_16k/average_l0_136",
        ),
        ("llama_scope_lxr_8x/15", ["Llama3_1-8B-Base-L15R-8x"], "Llama3_1-8B-Base-L15R-8x"),
        ("goodfire-llama-3.1-8b-instruct", ["Llama-SAE-l19.pth"], "Llama-SAE-l19.pth"),
    ],
)
def test_which_place_an_alias_names(ref: str, places: list[str] | tuple[str, ...], expected: str) -> None:
    alias = split_alias(ref)
    assert alias is not None
    assert place_of(*alias, places) == expected


@pytest.mark.parametrize(
    ("ref", "places", "message"),
    [
        ("gpt2-small-res-jb/12", ["blocks.8.hook_resid_pre"], "has no '12': an id is a layer, .* blocks.8"),
        ("gemma-scope-2b-pt-res/12", SCOPE, "has no '12': an id is a path, such as those in layer_12/width_16k"),
        (
            "gpt2-small-mlp-tm/1",
            ["sae_group_gpt2_blocks.1.hook_mlp_out_24576:v0"] * 2,
            "may be sae_.*: name one by",
        ),
        ("gpt2-small-res-jb/*", ["blocks.8.hook_resid_pre", "blocks.9.hook_resid_pre"], r"may be .*blocks\.9"),
    ],
)
def test_an_id_that_names_none_or_several(ref: str, places: list[str], message: str) -> None:
    alias = split_alias(ref)
    assert alias is not None
    with pytest.raises(DictlearnError, match=message):
        place_of(*alias, places)


def test_the_table() -> None:
    for name, release in RELEASES.items():
        assert parse(release.repo).repo == release.repo
        assert release.path.count("{}") == 1, name
    assert split_alias("someone/gpt2-small-res-jb") is None
    assert published_l0("gpt2-small-res-jb", "8", "blocks.8.hook_resid_pre") == 60
    assert published_l0("gpt2-small-res-jb", "blocks.11.hook_resid_post", "") == 70
    assert published_l0("gemma-scope-2b-pt-res", "x", "x") is None


def gemma_scope(folder: Path, l0: int) -> None:
    """The layout of Gemma Scope: W_enc is all `l0`."""
    arrays = {"W_enc": (6, 16), "b_enc": (16,), "W_dec": (16, 6), "b_dec": (6,), "threshold": (16,)}
    path = folder / GEMMA[0].format(l0)
    path.mkdir(parents=True)
    filled: dict[str, Any] = {key: np.full(shape, l0, dtype="float32") for key, shape in arrays.items()}
    np.savez(path / "params.npz", **filled)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "gemma"
    for l0 in (22, 82, 176):
        gemma_scope(folder, l0)
    native = tmp_path / "native"
    for name in ("resid_post.1", "mlp_out.1"):
        save(Linear.tiny().for_inference(), native / name)
    held = {
        repo: Repository({p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()})
        for repo, f in {"google/gemma-scope-2b-pt-res": folder, "someone/run": native}.items()
    }
    with hub(held) as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running


def test_a_release_is_loaded_by_its_alias(server: Hub) -> None:
    loaded = dictlearn.load("gemma-scope-2b-pt-res-canonical/12", dtype=torch.bfloat16)
    assert isinstance(loaded, Linear)
    assert loaded.W_enc.dtype == torch.bfloat16
    assert (loaded.W_enc == 82).all()
    assert loaded.reads == ("resid_post.12",)
    facts = {"lm_name": "google/gemma-2-2b", "prepend_bos": True, "modules": {"resid_post.12": "layers.12"}}
    assert loaded.metadata.items() >= facts.items()
    assert loaded.metadata["published_l0"] == 82
    assert loaded.metadata["source"] == {
        "repo": "google/gemma-scope-2b-pt-res",
        "revision": COMMIT,
        "path": "layer_12/width_16k/average_l0_82",
        "format": "gemma_scope",
        "config": {},
    }
    assert sum("params.npz" in request for request in server.requests if request.startswith("GET")) == 1


@pytest.mark.usefixtures("server")
def test_all_that_match_a_pattern() -> None:
    loaded = dictlearn.load("google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_?2")
    assert isinstance(loaded, dict)
    assert list(loaded) == ["layer_12_width_16k_average_l0_22", "layer_12_width_16k_average_l0_82"]
    assert [float(d.get_parameter("W_enc")[0, 0]) for d in loaded.values()] == [22, 82]
    with pytest.raises(DictlearnError, match=r"has no dictionary 'layer_9\*'; it has layer_12/width"):
        dictlearn.load("google/gemma-scope-2b-pt-res:layer_9*")


@pytest.mark.usefixtures("server")
def test_lists(tmp_path: Path) -> None:
    held = dictlearn.list("someone/run")
    assert held == ["someone/run:mlp_out.1", "someone/run:resid_post.1"]
    assert all(isinstance(dictlearn.load(ref), Dictionary) for ref in held)
    assert dictlearn.list(f"someone/run@{COMMIT}") == [f"{ref}@{COMMIT}" for ref in held]
    assert dictlearn.list("someone/run:mlp_out.1") == held[:1]
    of_alias = dictlearn.list("gemma-scope-2b-pt-res-canonical")
    assert of_alias == [f"google/gemma-scope-2b-pt-res:{GEMMA[0].format(l0)}" for l0 in (176, 22, 82)]
    on_disk = dictlearn.list(tmp_path / "native")
    assert [Path(ref).name for ref in on_disk] == ["mlp_out.1", "resid_post.1"]
    assert all(isinstance(dictlearn.load(ref), Dictionary) for ref in on_disk)
    (tmp_path / "empty").mkdir()
    for nothing in ("someone/run:readme", tmp_path / "empty"):
        with pytest.raises(DictlearnError, match="holds no dictionary of a known format"):
            dictlearn.list(nothing)


@pytest.mark.usefixtures("server")
def test_a_release_that_is_nearly_right() -> None:
    with pytest.raises(
        DictlearnError, match=r"no 'gpt2-small-res-jbb/8'.* Did you mean the release gpt2-small-res-jb\b"
    ):
        dictlearn.load("gpt2-small-res-jbb/8")
    with pytest.raises(DictlearnError, match=r"There is no 'someone/else'.*\)\.$"):
        dictlearn.load("someone/else")


@pytest.mark.usefixtures("server")
def test_references_of_every_kind_side_by_side(tmp_path: Path) -> None:
    found = locate(["someone/run:mlp_out.1", tmp_path / "native" / "mlp_out.1"])
    assert list(found) == ["someone_run_mlp_out.1", "native_mlp_out.1"]
    for place in found.values():
        place.read()
        assert place.weights.name == "sae_weights.safetensors"


def test_what_a_foreign_folder_on_disk_was(tmp_path: Path) -> None:
    gemma_scope(tmp_path, 82)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    path = GEMMA[0].format(82)
    assert loaded.metadata["source"] == {
        "folder": str(tmp_path),
        "path": path,
        "format": "gemma_scope",
        "config": {},
    }


def test_a_type_of_no_numbers(tmp_path: Path) -> None:
    save(Linear.tiny().for_inference(), tmp_path)
    with pytest.raises(DictlearnError, match=r"floating type such as torch.bfloat16, got torch.int32"):
        dictlearn.load(tmp_path, dtype=torch.int32)


def test_globs_on_disk_are_of_every_format(tmp_path: Path) -> None:
    for l0 in (22, 82):
        gemma_scope(tmp_path, l0)
    folders = f"{tmp_path}/layer_12/width_16k/*"
    loaded = dictlearn.load(folders)
    assert isinstance(loaded, dict)
    assert sorted(loaded) == ["average_l0_22", "average_l0_82"]
    one = tmp_path / GEMMA[0].format(22)
    assert list(locate([folders, one, str(one)])) == sorted(loaded)
    for part in ("", "layer_12"):
        with pytest.raises(DictlearnError, match=r"holds 2 dictionaries.*: name the path of one"):
            dictlearn.load(tmp_path / part)

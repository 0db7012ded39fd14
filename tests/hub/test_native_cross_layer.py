"""A cross-layer transcoder in the native format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dictlearn
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.hub import save
from dictlearn.registry import kinds, lookup
from dictlearn.types import DictlearnError, FormatError

WEIGHTS = "sae_weights.safetensors"


def made(sparsifier: str, skip: bool) -> CrossLayer:
    built = lookup("dictlearn.sparsifiers", sparsifier).tiny()
    reads, writes = ("mlp_in.0", "mlp_in.1"), ("mlp_out.0", "mlp_out.1")
    dictionary = CrossLayer(6, 5, 16, built, reads, writes, skip=skip)
    for parameter in dictionary.parameters():
        torch.nn.init.normal_(parameter)
    dictionary.project_()
    dictionary.read_scale.copy_(torch.tensor([0.5, 2.0]))
    dictionary.write_scale.copy_(torch.tensor([0.25, 3.0]))
    dictionary.metadata = {"lm_name": "embedded", "ctx": 128}
    return dictionary


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("sparsifier", kinds("dictlearn.sparsifiers"))
def test_round_trip(tmp_path: Path, sparsifier: str, skip: bool) -> None:
    dictionary = made(sparsifier, skip).for_inference()
    save(dictionary, tmp_path)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, CrossLayer)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_sae"]) == ("dictlearn_cross_layer", 16)
    assert cfg["metadata"]["dictlearn"]["sparsifier"]["kind"] == dictionary.sparsifier.kind != "_per_layer"
    x = torch.randn(7, 2, 6)
    assert torch.equal(loaded.encode(x), dictionary.encode(x))
    assert torch.equal(loaded(x).recon, dictionary(x).recon)
    assert (loaded.reads, loaded.writes, loaded.metadata) == (
        dictionary.reads,
        dictionary.writes,
        dictionary.metadata,
    )
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_rows_in_the_file_are_those_of_each_layer(tmp_path: Path) -> None:
    """Read by hand: W_dec_l [n_latents / L, L - l, d_out], one encoder column for each latent."""
    dictionary = made("relu", skip=True)
    save(dictionary.for_inference(), tmp_path)
    w = {name: value.double() for name, value in load_file(tmp_path / WEIGHTS).items()}
    assert {name: list(value.shape) for name, value in w.items()} == {
        "W_enc": [6, 16],
        "b_enc": [16],
        "W_dec_0": [8, 2, 5],
        "W_dec_1": [8, 1, 5],
        "b_dec": [2, 5],
        "W_skip": [2, 5, 6],
    }
    x = torch.randn(7, 2, 6).double()
    first, second = (
        (x[:, i] @ w["W_enc"][:, 8 * i : 8 * i + 8] + w["b_enc"][8 * i : 8 * i + 8]).relu() for i in (0, 1)
    )
    recon = [
        first @ w["W_dec_0"][:, 0] + w["b_dec"][0] + x[:, 0] @ w["W_skip"][0].T,
        first @ w["W_dec_0"][:, 1] + second @ w["W_dec_1"][:, 0] + w["b_dec"][1] + x[:, 1] @ w["W_skip"][1].T,
    ]
    torch.testing.assert_close(dictionary(x.float()).recon.double(), torch.stack(recon, 1), rtol=1e-4, atol=1e-4)


def change_own(folder: Path, **changes: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["dictlearn"] |= changes
    cfg["d_sae"] = cfg["metadata"]["dictlearn"]["n_latents"]
    (folder / "cfg.json").write_text(json.dumps(cfg))


def change_weights(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "rows of another shape": (
        lambda f: change_weights(f, W_dec_1=torch.zeros(8, 2, 5)),
        r"W_dec_1 must have shape \[8, 1, 5\], found \[8, 2, 5\]",
    ),
    "a layer less": (lambda f: change_weights(f, W_dec_1=None), r"missing \['W_dec_1'\]"),
    "a layer more": (lambda f: change_weights(f, W_dec_2=torch.zeros(1)), r"unexpected \['W_dec_2'\]"),
    "another number of layers": (
        lambda f: change_own(f, reads=["a", "b", "c", "d"], writes=["e", "f", "g", "h"]),
        r"missing \['W_dec_2', 'W_dec_3'\]",
    ),
    "more layers than latents": (
        lambda f: change_own(f, reads=["a"] * 17, writes=["b"] * 17),
        "n_latents must be a multiple of the 17 layers, got 16",
    ),
    "more than can be allocated": (
        lambda f: (change_own(f, n_latents=2**40), change_weights(f, W_enc=None))[0],
        r"missing \['W_enc'\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_before_anything_is_allocated(tmp_path: Path, damage: str) -> None:
    save(made("top_k", skip=False).for_inference(), tmp_path)
    act, message = DAMAGE[damage]
    act(tmp_path)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path)


def test_only_inference_dictionaries_are_written(tmp_path: Path) -> None:
    for sparsifier in ("top_k", "batch_top_k"):
        dictionary = made(sparsifier, skip=False)
        if sparsifier == "batch_top_k":  # folded, but its selection is that of a batch
            dictionary.read_scale.fill_(1.0)
            dictionary.write_scale.fill_(1.0)
        with pytest.raises(DictlearnError, match="for_inference"):
            save(dictionary, tmp_path)

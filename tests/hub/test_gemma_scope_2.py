"""Gemma Scope 2: files as Google has written them, against their rule in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.types import FormatError

D, N = 6, 16
REPO = "gemma-scope-2-1b-it"


def tensors(d_out: int = D, skip: bool = False) -> dict[str, Tensor]:
    shapes = {"w_enc": (D, N), "b_enc": (N,), "w_dec": (N, d_out), "b_dec": (d_out,), "threshold": (N,)}
    if skip:
        shapes["affine_skip_connection"] = (D, d_out)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write(folder: Path, w: dict[str, Tensor], cfg: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / "params.safetensors")
    if cfg is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **cfg}))


def load(folder: Path) -> Dictionary:
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, Dictionary)
    return loaded


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [D, 4])
def test_the_rule(tmp_path: Path, d_out: int, skip: bool) -> None:
    w = tensors(d_out, skip)
    write(tmp_path / "transcoder" / "layer_2_width_16k_l0_small", w)
    loaded = load(tmp_path)
    x = 2 * torch.randn(40, D)
    double = {name: tensor.double() for name, tensor in w.items()}
    pre = x.double() @ double["w_enc"] + double["b_enc"]
    latents = torch.where(pre > double["threshold"], pre.relu(), 0.0)
    recon = latents @ double["w_dec"] + double["b_dec"]
    if skip:
        recon = recon + torch.einsum("ti,io->to", x.double(), double["affine_skip_connection"])
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=1e-5, rtol=1e-5)
    assert (loaded.reads, loaded.writes) == (("mlp_in.2",), ("mlp_out.2",))


def write_layers(folder: Path, n_layers: int, d_out: int, skip: bool) -> list[dict[str, Tensor]]:
    """A file for each layer; decoders have rows for the layers before as well, which nothing writes."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = [tensors(d_out, skip) | {"w_dec": torch.randn(N, n_layers, d_out)} for _ in range(n_layers)]
    for i, w in enumerate(layers):
        save_file(w, folder / f"params_layer_{i}.safetensors")
    return [{name: tensor.double() for name, tensor in w.items()} for w in layers]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [D, 4])
def test_the_rule_of_cross_layer_transcoders(tmp_path: Path, d_out: int, skip: bool) -> None:
    folder = tmp_path / REPO / "clt" / "width_262k_l0_big_affine"
    layers = write_layers(folder, 12, d_out, skip)
    loaded = load(tmp_path / REPO)
    assert isinstance(loaded, CrossLayer)
    x = torch.randn(20, 12, D)
    latents = []
    for i, w in enumerate(layers):
        pre = torch.einsum("ti,il->tl", x[:, i].double(), w["w_enc"]) + w["b_enc"]
        latents.append(pre.relu() * (pre > w["threshold"]))
    recon = []
    for target, w in enumerate(layers):
        written = w["b_dec"] + sum(
            latents[source] @ layers[source]["w_dec"][:, target] for source in range(target + 1)
        )
        recon.append(written + x[:, target].double() @ w["affine_skip_connection"] if skip else written)
    torch.testing.assert_close(loaded.encode(x).double(), torch.cat(latents, -1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), torch.stack(recon, 1), atol=5e-5, rtol=1e-5)
    assert loaded.reads == tuple(f"mlp_in.{i}" for i in range(12))
    assert loaded.writes == tuple(f"mlp_out.{i}" for i in range(12))
    assert loaded.metadata["lm_name"] == "google/gemma-3-1b-it"


CROSS_LAYER_DAMAGE: dict[str, tuple[Any, str]] = {
    "a gap": (
        lambda f: (f / "params_layer_1.safetensors").unlink(),
        r"LAYER\.safetensors of every layer, it has \[0, 2\]",
    ),
    "fewer targets": (
        lambda f: save_file(tensors() | {"w_dec": torch.zeros(N, 2, D)}, f / "params_layer_1.safetensors"),
        r"params_layer_1\.safetensors: w_dec must have shape \[16, 3, 6\], found \[16, 2, 6\]",
    ),
    "one axis less": (
        lambda f: save_file(tensors(), f / "params_layer_0.safetensors"),
        r"params_layer_0\.safetensors must hold w_enc with two axes and w_dec with three",
    ),
    "one more": (
        lambda f: save_file(tensors(skip=True) | {"w_dec": torch.zeros(N, 3, D)}, f / "params_layer_2.safetensors"),
        r"params_layer_2\.safetensors must hold .*unexpected \['affine_skip_connection'\]",
    ),
    "NaN": (
        lambda f: save_file(
            tensors() | {"w_dec": torch.full((N, 3, D), torch.nan)}, f / "params_layer_2.safetensors"
        ),
        r"params_layer_2\.safetensors: w_dec has values that are not finite",
    ),
    "cut": (
        lambda f: (f / "params_layer_2.safetensors").write_bytes(b"\x08" * 99),
        r"params_layer_2\.safetensors is not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("damage", CROSS_LAYER_DAMAGE)
def test_damaged_cross_layer_transcoders(tmp_path: Path, damage: str) -> None:
    write_layers(tmp_path, 3, D, skip=False)
    act, message = CROSS_LAYER_DAMAGE[damage]
    act(tmp_path)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path)


LAYER = "model.layers.7"
POINTS = {
    "resid_post": (f"{LAYER}.output", f"{LAYER}.output", "resid_post.7", "resid_post.7"),
    "attn_out_all": (f"{LAYER}.self_attn.o_proj.input", f"{LAYER}.self_attn.o_proj.input", "attn_z.7", "attn_z.7"),
    "mlp_out": (
        f"{LAYER}.post_feedforward_layernorm.output",
        f"{LAYER}.post_feedforward_layernorm.output",
        *("mlp_out.7", "mlp_out.7"),
    ),
    "transcoder_all": (
        f"{LAYER}.pre_feedforward_layernorm.output",
        f"{LAYER}.post_feedforward_layernorm.output",
        *("mlp_in.7", "mlp_out.7"),
    ),
}


@pytest.mark.parametrize("folder", POINTS)
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_the_sites(tmp_path: Path, folder: str, configured: bool, prefix: str) -> None:
    point_in, point_out, read, write_site = POINTS[folder]
    points = (point.replace("model.", prefix, 1) for point in (point_in, point_out))
    keys: list[str] = ["hf_hook_point_in", "hf_hook_point_out"]
    cfg = dict(zip(keys, points, strict=True)) if configured else None
    name = "layer_7_width_16k_l0_medium" if not configured else "any"
    write(tmp_path / REPO / folder / name, tensors(), cfg)
    loaded = load(tmp_path / REPO)
    assert (loaded.reads, loaded.writes) == ((read,), (write_site,))
    assert loaded.metadata["lm_name"] == "google/gemma-3-1b-it"
    itself = load(tmp_path / REPO / folder / name)
    assert (itself.reads, itself.writes) == (loaded.reads, loaded.writes)


@pytest.mark.parametrize(
    ("repo", "lm"),
    [
        ("gemma-scope-2-270m-pt", "google/gemma-3-270m"),
        ("gemma-scope-2-270m-it", "google/gemma-3-270m-it"),
        ("gemma-scope-2-27b-pt", "google/gemma-3-27b-pt"),
        ("mine", None),
    ],
)
def test_the_language_model(tmp_path: Path, repo: str, lm: str | None) -> None:
    write(tmp_path / repo, tensors())
    loaded = load(tmp_path / repo)
    assert (loaded.metadata["lm_name"], loaded.reads) == (lm, ("x",))


@pytest.mark.parametrize("name", ["gemma-v3-4b-it", "google/gemma-3-4b-it"])
def test_the_language_model_of_the_configuration(tmp_path: Path, name: str) -> None:
    write(tmp_path, tensors(), {"model_name": name})
    assert load(tmp_path).metadata["lm_name"] == "google/gemma-3-4b-it"


@pytest.mark.parametrize(
    ("w", "points"),
    [
        (tensors(d_out=4), []),
        (tensors(skip=True), []),
        (tensors(), [f"{LAYER}.mlp.input", f"{LAYER}.mlp.output"]),
    ],
)
def test_a_transcoder_without_known_sites_has_two(tmp_path: Path, w: dict[str, Tensor], points: list[str]) -> None:
    write(tmp_path, w, dict(zip(("hf_hook_point_in", "hf_hook_point_out"), points, strict=False)))
    loaded = load(tmp_path)
    assert (loaded.reads, loaded.writes) == (("x",), ("y",))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"threshold": None}, r"missing \['threshold'\]"),
        ({"w_enc": None}, "must hold w_enc with two axes"),
        ({"w_dec": torch.ones(N, 2, D)}, r"w_dec must have shape \[16, 6\]"),
        ({"b_dec": torch.full((D,), torch.inf)}, "b_dec has values that are not finite"),
        ({"affine_skip_connection": torch.ones(D)}, "affine_skip_connection must have shape"),
        ({"more": torch.ones(1)}, r"unexpected \['more'\]"),
    ],
)
def test_what_is_refused(tmp_path: Path, changed: dict[str, Tensor | None], message: str) -> None:
    write(tmp_path, {name: value for name, value in {**tensors(), **changed}.items() if value is not None})
    with pytest.raises(FormatError, match=f"params.safetensors.*{message}"):
        dictlearn.load(tmp_path)


def test_another_architecture(tmp_path: Path) -> None:
    write(tmp_path, tensors(), {"architecture": "topk"})
    with pytest.raises(FormatError, match=r"config\.json: architecture must be jump_relu, got 'topk'"):
        dictlearn.load(tmp_path)

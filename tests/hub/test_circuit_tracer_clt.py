"""Cross-layer transcoders in circuit-tracer's files, against its rule in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import dictlearn
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.hub import save
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError
from tests.hub.made import cross_layer, made, same

L, D, N = 3, 5, 14
CONFIG = {
    "model_name": "google/gemma-2-2b",
    "model_kind": "cross_layer_transcoder",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}
CASES: dict[str, dict[str, Any]] = {
    "relu": {},
    "jump_relu": {"jump": True},
    "skip": {"skip": True},
    "jump_relu, skip": {"jump": True, "skip": True},
    "bfloat16": {"jump": True, "dtype": torch.bfloat16},
}


def write(
    folder: Path, jump: bool = False, skip: bool = False, dtype: torch.dtype = torch.float32, **cfg: Any
) -> dict[str, Tensor]:
    """Random weights of three layers; returned by name, in float64."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tensor] = {}
    for i in range(L):
        shapes: dict[str, tuple[int, ...]] = {f"W_enc_{i}": (N, D), f"b_enc_{i}": (N,), f"b_dec_{i}": (D,)}
        shapes |= {f"threshold_{i}": (N,)} if jump else {}
        encoder = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        encoder |= {name: tensor.abs() for name, tensor in encoder.items() if "threshold" in name}
        decoder = {f"W_dec_{i}": torch.randn(N, L - i, D, generator=generator).to(dtype)}
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
        found |= encoder | decoder
    if skip:
        found["W_skip"] = torch.randn(L, D, D, generator=generator)
        save_file({"W_skip": found["W_skip"]}, folder / "W_skip.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **cfg}))
    return {name: tensor.double() for name, tensor in found.items()}


def rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of all layers side by side, and what is written, [n_tokens, layer, width]."""
    x, latents = x.double(), []
    for i in range(L):
        pre = torch.einsum("ti,li->tl", x[:, i], w[f"W_enc_{i}"]) + w[f"b_enc_{i}"]
        latents.append(pre * (pre > w[f"threshold_{i}"]) if f"threshold_{i}" in w else pre.relu())
    recon = []
    for target in range(L):
        written = w[f"b_dec_{target}"].expand(len(x), D)
        for source in range(target + 1):
            for latent in range(N):
                rows = w[f"W_dec_{source}"][latent]  # [layers from `source` on, width]
                written = written + latents[source][:, latent, None] * rows[target - source]
        recon.append(written + x[:, target] @ w["W_skip"][target] if "W_skip" in w else written)
    return torch.cat(latents, -1), torch.stack(recon, 1)


def check(folder: Path, w: dict[str, Tensor]) -> CrossLayer:
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, CrossLayer)
    x = 2 * torch.randn(30, L, D)
    latents, recon = rule(w, x)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_sparse(x).to_dense().double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=2e-5, rtol=1e-5)
    assert 0 < float((latents > 0).double().mean()) < 0.9
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_the_rule(tmp_path: Path, case: str) -> None:
    loaded = check(tmp_path, write(tmp_path, **CASES[case]))
    assert loaded.reads == tuple(f"resid_mid.{i}" for i in range(L))
    assert loaded.writes == tuple(f"mlp_out.{i}" for i in range(L))
    assert loaded.metadata["lm_name"] == "google/gemma-2-2b"


def test_thresholds_with_an_axis_of_one(tmp_path: Path) -> None:
    w = write(tmp_path, jump=True)
    for i in range(L):
        tensors = load_file(tmp_path / f"W_enc_{i}.safetensors")
        tensors[f"threshold_{i}"] = tensors[f"threshold_{i}"][None].clone()
        save_file(tensors, tmp_path / f"W_enc_{i}.safetensors")
    check(tmp_path, w)


def test_one_of_a_folder_with_others(tmp_path: Path) -> None:
    w = write(tmp_path / "set" / "a", feature_input_hook="mlp.hook_in")
    assert check(tmp_path / "set", w).reads == tuple(f"mlp_in.{i}" for i in range(L))


def change(folder: Path, name: str, **changes: Tensor | None) -> None:
    tensors = {**load_file(folder / name), **changes}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / name)


DAMAGE: dict[str, tuple[Any, str]] = {
    "no bias": (
        lambda f: change(f, "W_enc_1.safetensors", b_enc_1=None),
        r"W_enc_1\.safetensors must hold .*missing \['b_enc_1'\]",
    ),
    "one more": (
        lambda f: change(f, "W_dec_2.safetensors", more=torch.zeros(1)),
        r"W_dec_2\.safetensors must hold .*unexpected \['more'\]",
    ),
    "a layer without a threshold": (
        lambda f: change(f, "W_enc_2.safetensors", threshold_2=None),
        r"W_enc_2\.safetensors must hold .*missing \['threshold_2'\]",
    ),
    "all layers are written": (
        lambda f: change(f, "W_dec_1.safetensors", W_dec_1=torch.zeros(N, L, D)),
        r"W_dec_1\.safetensors: W_dec_1 must have shape \[14, 2, 5\], found \[14, 3, 5\]",
    ),
    "another width": (
        lambda f: change(f, "W_enc_1.safetensors", W_enc_1=torch.zeros(N + 1, D)),
        r"W_enc_1 must have shape \[14, 5\], found \[15, 5\]",
    ),
    "NaN": (
        lambda f: change(f, "W_enc_2.safetensors", b_dec_2=torch.full((D,), torch.nan)),
        r"W_enc_2\.safetensors: b_dec_2 has values that are not finite",
    ),
    "no axes": (
        lambda f: change(f, "W_dec_0.safetensors", W_dec_0=torch.zeros(3)),
        r"W_enc_0\.safetensors must hold W_enc_0 with two axes and W_dec_0\.safetensors W_dec_0 with three",
    ),
    "a gap": (
        lambda f: (f / "W_dec_1.safetensors").unlink(),
        r"must hold the files of 3 layers; missing \['W_dec_1\.safetensors'\]",
    ),
    "cut": (
        lambda f: (f / "W_dec_1.safetensors").write_bytes((f / "W_dec_1.safetensors").read_bytes()[:-7]),
        r"W_dec_1\.safetensors is not a whole safetensors file",
    ),
    "thresholds below 0": (
        lambda f: change(f, "W_enc_1.safetensors", threshold_1=torch.linspace(-0.5, 1.0, N)),
        r"W_enc_1\.safetensors: threshold_1 below 0 is not supported because .*; found -0\.5",
    ),
    "one skip path for all": (
        lambda f: save_file({"W_skip": torch.zeros(D, D)}, f / "W_skip.safetensors"),
        r"W_skip\.safetensors: W_skip must have shape \[3, 5, 5\], found \[5, 5\]",
    ),
    "too large": (
        lambda f: change(f, "W_enc_0.safetensors", b_dec_0=torch.full((D,), 1e300, dtype=torch.float64)),
        "too large: b_dec would not be finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    write(tmp_path, jump=True)
    act, message = DAMAGE[damage]
    act(tmp_path)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"feature_input_hook": "ln2.hook_normalized"}, "is not supported because"),
        ({"feature_input_hook": "hook_mlp_out"}, "feature_input_hook and feature_output_hook must be two sites"),
        ({"feature_output_hook": "hook_q"}, "feature_output_hook must be one of"),
        ({"model_kind": "transcoder_set"}, "exactly one known format; it is none"),
    ],
)
def test_what_a_configuration_may_say(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    write(tmp_path, **cfg)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path)


def layers(kind: str, first: int = 0) -> list[str]:
    return [f"{kind}.{layer}" for layer in range(first, first + L)]


@pytest.mark.parametrize("site", ["mlp_in", "resid_mid"])
@pytest.mark.parametrize("jump", [False, True])
def test_what_is_written(tmp_path: Path, jump: bool, site: str) -> None:
    """The rule on the files gives what the dictionary does, and they are read as the same dictionary."""
    dictionary = cross_layer(JumpReLU(penalty="l0") if jump else ReLU(0.0), layers(site), layers("mlp_out"))
    save(dictionary, tmp_path, format="circuit_tracer_clt")
    hook = {"mlp_in": "mlp.hook_in", "resid_mid": "hook_resid_mid"}[site]
    cfg = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert cfg == {**CONFIG, "model_name": "org/lm", "feature_input_hook": hook}
    w: dict[str, Tensor] = {}
    for i in range(L):
        own = {f"W_enc_{i}": (N, D), f"b_enc_{i}": (N,), f"b_dec_{i}": (D,)} | (
            {f"threshold_{i}": (N,)} if jump else {}
        )
        encoder, decoder = (load_file(tmp_path / f"W_{end}_{i}.safetensors") for end in ("enc", "dec"))
        assert {name: tuple(tensor.shape) for name, tensor in encoder.items()} == own
        assert {name: tuple(tensor.shape) for name, tensor in decoder.items()} == {f"W_dec_{i}": (N, L - i, D)}
        w |= {name: tensor.double() for name, tensor in (encoder | decoder).items()}
    x = 2 * torch.randn(30, L, D)
    latents, recon = rule(w, x)
    torch.testing.assert_close(dictionary.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary(x).recon.double(), recon, atol=2e-5, rtol=1e-5)
    same(dictlearn.load(tmp_path), dictionary)


NOT_WRITTEN: dict[str, tuple[Any, str]] = {
    "top_k": (lambda: cross_layer(TopK(3), layers("mlp_in"), layers("mlp_out")), "its sparsifier is top_k"),
    "skip": (lambda: cross_layer(ReLU(0.0), layers("mlp_in"), layers("mlp_out"), skip=True), "it has a skip path"),
    "later layers": (
        lambda: cross_layer(ReLU(0.0), layers("mlp_in", 1), layers("mlp_out", 1)),
        "it reads mlp_in.1, mlp_in.2, mlp_in.3, and not all layers from 0",
    ),
    "other sites": (
        lambda: cross_layer(ReLU(0.0), layers("attn_in"), layers("attn_out")),
        "it reads attn_in.0, .* and writes attn_out.0",
    ),
    "linear": (lambda: made(ReLU(0.0), ("mlp_in.0", "mlp_out.0")), "it is a linear one"),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_is_not_written(tmp_path: Path, case: str) -> None:
    make, message = NOT_WRITTEN[case]
    with pytest.raises(DictlearnError, match=f"cross-layer transcoders .* because {message}"):
        save(make(), tmp_path / "a", format="circuit_tracer_clt")
    assert not (tmp_path / "a").exists()

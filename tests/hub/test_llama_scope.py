"""Llama Scope: files as OpenMOSS has written them, against the rule of their training in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.types import FormatError

D, N, K, T = 6, 24, 4, 0.8
CONFIG: dict[str, Any] = {
    "d_model": D,
    "d_sae": N,
    "act_fn": "jumprelu",
    "jump_relu_threshold": T,
    "top_k": K,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 5.0, "out": 5.0},
    "sparsity_include_decoder_norm": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
}
TRANSCODER = {
    "hook_point_in": "blocks.3.hook_resid_mid",
    "hook_point_out": "blocks.3.hook_mlp_out",
    "dataset_average_activation_norm": {"in": 5.0, "out": 0.7},
}
CASES: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "trained with topk": {"act_fn": "topk"},
    "topk": {"act_fn": "topk", "jump_relu_threshold": None},
    "without decoder norms": {"sparsity_include_decoder_norm": False},
    "topk without decoder norms": {"act_fn": "topk", "jump_relu_threshold": 0.0, **TRANSCODER},
    "transcoder": TRANSCODER,
    "without a bias": {"use_decoder_bias": False},
}


def write(folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Random weights in bfloat16, with decoder columns of many norms; the configuration, and the tensors."""
    cfg = CONFIG | settings
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "decoder.bias": (D,)}
    w = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    w["decoder.weight"] *= torch.rand(N, generator=generator) * 2
    w["decoder.weight"][:, 0] = 0.0
    if not cfg["use_decoder_bias"]:
        del w["decoder.bias"]
    w = {name: tensor.bfloat16() for name, tensor in w.items()}
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(w, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(cfg))
    return cfg, w


def rule(cfg: dict[str, Any], w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The forward rule of the training, in its units: x is scaled, decoder norms take part in the gate.

    Latents are those of the published inference model: in raw units, with decoder rows of norm 1.
    """
    norms = cfg["dataset_average_activation_norm"]
    scale_in, scale_out = (D**0.5 / norms[end] for end in ("in", "out"))
    w = {name: tensor.double() for name, tensor in w.items()}
    rows, recons = [], []
    for token in x.double():
        pre = w["encoder.weight"] @ (scale_in * token) + w["encoder.bias"]
        lengths = torch.stack([column.norm() for column in w["decoder.weight"].T])
        if cfg["sparsity_include_decoder_norm"]:
            value = pre * lengths / scale_out
        else:
            value, lengths = pre / scale_in, torch.ones(N)
        if cfg["act_fn"] == "jumprelu" or cfg["jump_relu_threshold"]:
            fires = value > cfg["jump_relu_threshold"]
        else:
            best = sorted(range(N), key=lambda i, value=value: -float(value[i]))[:K]
            fires = torch.tensor([i in best for i in range(N)]) & (value > 0)
        rows.append(torch.where(fires, value, 0.0))
        recon = w["decoder.weight"] @ torch.where(fires, pre, 0.0)
        recons.append((recon + w.get("decoder.bias", torch.zeros(D))) / scale_out)
    return torch.stack(rows), torch.stack(recons)


def load(folder: Path) -> Dictionary:
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, Dictionary)
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_the_rule(tmp_path: Path, case: str) -> None:
    cfg, w = write(tmp_path, **CASES[case])
    loaded = load(tmp_path)
    x = 2 * torch.randn(50, D)
    latents, recon = rule(cfg, w, x)
    assert 0 < int((latents > 0).sum()) < latents.numel()
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_sparse(x).to_dense().double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("hook", "site"), [("hook_attn_out", "attn_out.9"), ("hook_mlp_out", "mlp_out.9")])
def test_sites_and_metadata(tmp_path: Path, hook: str, site: str) -> None:
    write(
        tmp_path / "Llama3_1-8B-Base-L9A-8x",
        hook_point_in=f"blocks.9.{hook}",
        hook_point_out=f"blocks.9.{hook}",
    )
    loaded = load(tmp_path)
    assert (loaded.reads, loaded.writes) == ((site,), (site,))
    known = {"lm_name": "meta-llama/Llama-3.1-8B", "ctx": 1024, "prepend_bos": True}
    assert loaded.metadata.items() >= known.items()


def test_a_transcoder_has_two_sites(tmp_path: Path) -> None:
    write(tmp_path, **TRANSCODER)
    loaded = load(tmp_path)
    assert (loaded.reads, loaded.writes) == (("resid_mid.3",), ("mlp_out.3",))


NO_NORM = {"dataset_average_activation_norm": {"in": 5.0}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_glu_encoder": True}, "use_glu_encoder=True is not supported because"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder=True is not supported"),
        ({"act_fn": "relu"}, "act_fn must be one of jumprelu, topk, got 'relu'"),
        ({"norm_activation": "token-wise"}, "norm_activation must be one of dataset-wise, got 'token-wise'"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold must be a finite number, at least 0, got None"),
        ({"jump_relu_threshold": -1.0}, "jump_relu_threshold must be a finite number, at least 0, got -1.0"),
        (NO_NORM, r"dataset_average_activation_norm\.out must be a positive number, got None"),
        ({"dataset_average_activation_norm": 3.0}, "must be a positive number"),
        ({"d_model": "6"}, "d_model must be a whole number"),
        ({"d_model": 10**400}, "too large"),
        ({"jump_relu_threshold": 10**400}, "jump_relu_threshold must be a finite number"),
        ({"d_sae": 0}, "d_sae must be a whole number"),
        ({"act_fn": "topk", "jump_relu_threshold": 0, "top_k": 25}, "at most n_latents = 24, got 25"),
        ({"use_decoder_bias": "no"}, "use_decoder_bias must be true or false"),
        (
            {"hook_point_in": "blocks.3.ln2.hook_normalized"},
            "hook_point_in='blocks.3.ln2.* is not supported because",
        ),
        ({"hook_point_out": None}, "hook_point_out=None is not supported because"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write(tmp_path, **{key: value for key, value in settings.items() if key != "use_decoder_bias"})
    (tmp_path / "hyperparams.json").write_text(json.dumps(CONFIG | settings))
    with pytest.raises(FormatError, match=rf"hyperparams\.json: .*{message}"):
        dictlearn.load(tmp_path)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda w: w.pop("encoder.bias"), r"missing \['encoder.bias'\]"),
    "extra": (lambda w: w.update(more=torch.ones(1)), r"unexpected \['more'\]"),
    "shape": (
        lambda w: w.update({"decoder.weight": torch.ones(N, D)}),
        r"decoder.weight must have shape \[6, 24\]",
    ),
    "nan": (lambda w: w["encoder.weight"].fill_(torch.nan), "encoder.weight has values that are not finite"),
    "overflow": (lambda w: w["decoder.weight"].fill_(1e38), "values are too large: W_... would not be finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(tmp_path: Path, damage: str) -> None:
    _, w = write(tmp_path)
    change, message = DAMAGES[damage]
    change(w)
    save_file(w, tmp_path / "checkpoints" / "final.safetensors")
    with pytest.raises(FormatError, match=f"final.safetensors.*({message})"):
        dictlearn.load(tmp_path)


def test_a_threshold_that_no_float_holds(tmp_path: Path) -> None:
    write(tmp_path, jump_relu_threshold=1e308)
    with pytest.raises(FormatError, match=r"final\.safetensors: the values are too large: sparsifier\.threshold"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("name", ["hyperparams.json", "checkpoints/final.safetensors"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(FormatError, match=f"{name} is not"):
        dictlearn.load(tmp_path)

"""SAELens before version 6: files as it wrote them, against its rules in float64."""

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
from dictlearn.hub.codecs.saelens_legacy import SAELensLegacy
from dictlearn.hub.files import Files, local_files
from dictlearn.types import FormatError

D, N, K = 6, 20, 3
RUNNER = {  # of version 0.2: the configuration of the whole training
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "d_in": D,
    "d_sae": N,
    "l1_coefficient": 8e-5,
    "dtype": "torch.float32",
}
FLAT = {  # of version 5
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "dtype": "float32",
    "device": "cuda",
    "model_name": "gemma-2b",
    "hook_name": "blocks.3.hook_mlp_out",
    "hook_layer": 3,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "5.3.0",
    "prepend_bos": False,
    "context_size": 64,
    "normalize_activations": "none",
    "model_from_pretrained_kwargs": {},
}
BASIC = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
GATED = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,), "b_gate": (N,), "b_mag": (N,), "r_mag": (N,)}


def write(
    folder: Path, cfg: dict[str, Any], shapes: dict[str, tuple[int, ...]] = BASIC, **more: Tensor | None
) -> dict[str, Tensor]:
    """Random weights, in float64."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    w: dict[str, Any] = {name: 0.7 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    w = {name: tensor for name, tensor in {**w, **more}.items() if tensor is not None}
    save_file(w, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(N)}, folder / "sparsity.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return {name: tensor.double() for name, tensor in w.items()}


def rule(w: dict[str, Tensor], x: Tensor, apply_b_dec: bool = True, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of activations that have been normalised."""
    pre = (x.double() - w["b_dec"] * apply_b_dec) @ w["W_enc"]
    if "b_gate" in w:
        latents = (pre + w["b_gate"] > 0) * (pre * w["r_mag"].exp() + w["b_mag"]).relu()
    else:
        pre = pre + w["b_enc"]
        latents = pre.relu() * (pre > w["threshold"]) if "threshold" in w else pre.relu()
    for row in latents if k is not None else ():
        row[torch.tensor(sorted(range(N), key=lambda i: float(row[i]))[: N - (k or 0)])] = 0.0
    factor = w.get("scaling_factor", w.get("finetuning_scaling_factor", torch.ones(N).double()))
    return latents, (latents * factor) @ w["W_dec"] + w["b_dec"]


def load(folder: Path) -> Dictionary:
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, Dictionary)
    return loaded


def check(loaded: Dictionary, x: Tensor, latents: Tensor, recon: Tensor) -> None:
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_sparse(x).to_dense().double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=1e-5, rtol=1e-5)
    assert 0 < float((latents != 0).double().mean()) < 0.9


def acts() -> Tensor:
    return 2 * torch.randn(50, D) + torch.linspace(-3, 5, 50).unsqueeze(-1)  # means far from 0


CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "runner": (RUNNER, BASIC, {}),
    "no bias on the input": (RUNNER | {"apply_b_dec_to_input": False}, BASIC, {"apply_b_dec": False}),
    "standard": (FLAT, BASIC, {}),
    "jumprelu": (FLAT | {"architecture": "jumprelu"}, BASIC | {"threshold": (N,)}, {}),
    "gated": (FLAT | {"architecture": "gated"}, GATED, {}),
    "gated, no bias on the input": (
        FLAT | {"architecture": "gated", "apply_b_dec_to_input": False},
        GATED,
        {"apply_b_dec": False},
    ),
    "topk": (FLAT | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, BASIC, {"k": K}),
    "topk by its architecture": (
        FLAT | {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        BASIC,
        {"k": K},
    ),
    "topk of another spelling": (
        RUNNER | {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}},
        BASIC,
        {"k": K},
    ),
    "scaling_factor": (RUNNER, BASIC | {"scaling_factor": (N,)}, {}),
    "gated, finetuned": (
        FLAT | {"architecture": "gated", "finetuning_scaling_factor": True},
        GATED | {"finetuning_scaling_factor": (N,)},
        {},
    ),
    "normalize_activations false": (RUNNER | {"normalize_activations": False}, BASIC, {}),
    "normalize_activations null": (RUNNER | {"normalize_activations": None}, BASIC, {}),
    "an early version 5": (FLAT | {"sae_lens_version": "5.10.2"}, BASIC, {}),
    "metadata of an early version": (FLAT | {"metadata": {"sae_lens_version": "5.10.2"}}, BASIC, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rule(tmp_path: Path, case: str) -> None:
    cfg, shapes, how = CASES[case]
    w, x = write(tmp_path, cfg, shapes), acts()
    loaded = load(tmp_path)
    check(loaded, x, *rule(w, x, **how))
    runner = "hook_point" in cfg
    site = "resid_pre.8" if runner else "mlp_out.3"
    assert (loaded.reads, loaded.writes) == ((site,), (site,))
    assert loaded.metadata["prepend_bos"] is runner
    assert loaded.metadata["ctx"] == (128 if runner else 64)
    assert "centred" not in loaded.metadata


def test_a_log_threshold_of_a_training(tmp_path: Path) -> None:
    log = torch.linspace(-2.0, 1.0, N)
    w = write(tmp_path, FLAT | {"architecture": "jumprelu"}, log_threshold=log)
    x = acts()
    check(load(tmp_path), x, *rule({**w, "threshold": log.double().exp()}, x))


def test_a_scaling_factor_of_ones_changes_nothing(tmp_path: Path) -> None:
    w = write(tmp_path, RUNNER, scaling_factor=torch.ones(N))
    loaded = load(tmp_path)
    assert torch.equal(loaded.get_parameter("W_dec").double(), w["W_dec"])


def test_layer_norm(tmp_path: Path) -> None:
    """As the OpenAI ones are stored: TopK, of tokens normalised by themselves."""
    cfg = FLAT | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    w, x = write(tmp_path, cfg | {"normalize_activations": "layer_norm"}), acts()
    mean = x.double().sum(-1, keepdim=True) / D
    std = ((x.double() - mean).square().sum(-1, keepdim=True) / (D - 1)).sqrt()
    latents, recon = rule(w, (x - mean) / (std + 1e-5), k=K)
    check(load(tmp_path), x, latents, recon * std + mean)


RELEASES = {
    "centred residual": ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre", RUNNER),
    "feature splitting": (
        "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
        "blocks.8.hook_resid_pre_768",
        RUNNER,
    ),
    "centred, by its configuration": (
        "someone/mine",
        "a",
        RUNNER | {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
    ),
}


@pytest.mark.parametrize("case", RELEASES)
def test_centred_activations(tmp_path: Path, case: str) -> None:
    """What was trained on is each token without its mean; the model's own activations give the same latents."""
    repo, place, cfg = RELEASES[case]
    folder = tmp_path / repo.partition("/")[2] / place
    w, x = write(folder, cfg), acts()
    mean = x.double().mean(-1, keepdim=True)
    latents, recon = rule(w, x - mean)
    loaded = load(folder)
    check(loaded, x, latents, recon + mean)
    assert (loaded.input_norm, loaded.metadata["centred"]) == ("centre", True)


def test_centring_does_not_reach_inside_a_block(tmp_path: Path) -> None:
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    w, x = write(tmp_path, RUNNER | centred | {"hook_point": "blocks.8.attn.hook_z"}), acts()
    loaded = load(tmp_path)
    check(loaded, x, *rule(w, x))
    assert (loaded.reads, "centred" in loaded.metadata) == (("attn_z.8",), False)


SCALED = {
    "tommmcgrath/gpt2-small-mlp-out-saes:sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1": 1.049317,
    "tommmcgrath/gpt2-small-mlp-out-saes:sae_group_gpt2_blocks.7.hook_mlp_out_24576:v0": 1.104291,
    "tommmcgrath/gpt2-small-mlp-out-saes:sae_group_gpt2_blocks.11.hook_mlp_out_24576:v2": 0.285155,
    "jbloom/Gemma-2b-Residual-Stream-SAEs:gemma_2b_blocks.12.hook_resid_post_16384": 0.213819384,
}


@pytest.mark.parametrize("mode", [True, "expected_average_only_in"])
@pytest.mark.parametrize("ref", SCALED)
def test_activations_that_were_scaled(tmp_path: Path, ref: str, mode: object) -> None:
    """Of a copy in the Hub's cache, where the repository is known by name alone."""
    (repo, _, place), s = ref.partition(":"), SCALED[ref]
    hook = place.removeprefix("sae_group_gpt2_").removeprefix("gemma_2b_").rpartition("_")[0]
    w, x = write(tmp_path / place, RUNNER | {"hook_point": hook, "normalize_activations": mode}), acts()
    names = (f"{place}/cfg.json", f"{place}/sae_weights.safetensors")
    files = Files(repo, names, tmp_path.joinpath, {"repo": repo, "revision": "0"})
    loaded = SAELensLegacy().read(files, place)
    centred = "mlp_out" in hook
    mean = x.double().mean(-1, keepdim=True) * centred
    latents, recon = rule(w, s * (x - mean))
    check(loaded, x, latents, recon / s + mean)
    assert loaded.metadata.get("centred", False) is centred
    copy = tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / "0"
    write(copy / place, RUNNER | {"hook_point": hook, "normalize_activations": mode})
    assert torch.equal(load(copy / place).get_parameter("W_enc"), loaded.get_parameter("W_enc"))


def test_mistral_is_of_constant_norm(tmp_path: Path) -> None:
    folder = tmp_path / "Mistral-7B-Residual-Stream-SAEs" / "mistral_7b_layer_16"
    w, x = write(folder, RUNNER | {"normalize_activations": "none"}), acts()
    factor = D**0.5 / x.double().square().sum(-1, keepdim=True).sqrt()
    latents, recon = rule(w, x * factor)
    check(load(folder), x, latents, recon / factor)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "scaled": ({"normalize_activations": True}, {}, r"cfg\.json: .*not supported because the scale is not in the"),
    "tanh": (
        {"activation_fn_str": "tanh-relu"},
        {},
        r"cfg\.json: activation_fn=tanh-relu is not supported because",
    ),
    "activation": ({"activation_fn_str": "gelu"}, {}, "activation_fn must be one of relu, topk, got 'gelu'"),
    "gated topk": (
        {"activation_fn_str": "topk", "architecture": "gated"},
        {},
        "goes with architecture=standard or topk, got gated",
    ),
    "architecture": ({"architecture": "moe"}, {}, "architecture must be one of standard, .*got 'moe'"),
    "no k": ({"activation_fn_str": "topk"}, {}, "k must be a whole number, at least 1, got None|Type-check"),
    "k too large": (
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 21}},
        {},
        "k must be at most n_latents = 20, got 21",
    ),
    "kwargs": ({"activation_fn_kwargs": [3]}, {}, "missing or wrong field"),
    "norm": ({"normalize_activations": "whiten"}, {}, "normalize_activations must be one of none, .*got 'whiten'"),
    "a head": ({"hook_head_index": 3}, {}, "hook_head_index=3 is not supported because"),
    "width": ({"d_in": 7}, {}, r"weights\.safetensors: W_enc must have shape \[7, 20\], found \[6, 20\]"),
    "latents": ({"d_sae": 21}, {}, r"W_enc must have shape \[6, 21\], found \[6, 20\]"),
    "flag": ({"apply_b_dec_to_input": 1}, {}, r"cfg\.json: apply_b_dec_to_input must be true or false, got 1"),
    "missing": ({}, {"b_enc": None}, r"missing \['b_enc'\]"),
    "no encoder": ({}, {"W_enc": None}, "must hold W_enc with two axes"),
    "more": ({}, {"more": torch.zeros(1)}, r"unexpected \['more'\]"),
    "NaN": ({}, {"b_dec": torch.full((D,), torch.nan)}, "b_dec has values that are not finite"),
    "factors": ({}, {"scaling_factor": torch.ones(3)}, r"scaling_factor must have shape \[20\], found \[3\]"),
    "two factors": (
        {},
        {"scaling_factor": torch.ones(N), "finetuning_scaling_factor": torch.ones(N)},
        r"unexpected \['finetuning_scaling_factor'\]",
    ),
    "too large": ({}, {"scaling_factor": torch.full((N,), 3e38)}, "too large: W_dec would not be finite"),
    "centred, of constant norm": (
        {
            "model_from_pretrained_kwargs": {"center_writing_weights": True},
            "normalize_activations": "constant_norm_rescale",
        },
        {},
        "with center_writing_weights is not supported because",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    changes, tensors, message = REFUSED[case]
    write(tmp_path, FLAT | changes, **tensors)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("version", ["6.0.0", "6.0.0-rc.0", "6.54.12", "10.1"])
@pytest.mark.parametrize("nested", [True, False])
def test_from_version_6_it_is_the_native_format(tmp_path: Path, version: str, nested: bool) -> None:
    stated = (
        {"metadata": {"sae_lens_version": version}} if nested else {"sae_lens_version": version, "metadata": {}}
    )
    w, x = write(tmp_path, {"architecture": "standard", "d_in": D, "d_sae": N, **stated}), acts()
    assert not SAELensLegacy().matches(local_files(tmp_path), "")
    check(load(tmp_path), x, *rule(w, x))


def test_cut_files(tmp_path: Path) -> None:
    write(tmp_path, RUNNER)
    whole = (tmp_path / "sae_weights.safetensors").read_bytes()
    (tmp_path / "sae_weights.safetensors").write_bytes(whole[:-9])
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors is not a whole safetensors file"):
        dictlearn.load(tmp_path)

"""OpenMOSS, Llama Scope R1 and 2: files as they write them, against their forward rule in float64."""

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

D, N, K = 6, 24, 4
AVERAGE = "dataset_average_activation_norm"
POST, MID, OUT = (f"blocks.7.{hook}" for hook in ("hook_resid_post", "hook_resid_mid", "hook_mlp_out"))
NORMED = "blocks.7.ln2.hook_normalized"
CONFIG: dict[str, Any] = {
    "sae_type": "sae",
    "d_model": D,
    "expansion_factor": 4,
    "use_decoder_bias": True,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": K,
    "hook_point_in": POST,
    "hook_point_out": POST,
    "use_glu_encoder": False,
}
AVERAGES = {POST: 7.0, MID: 5.0, OUT: 0.6, NORMED: 2.0}
TRANSCODER: dict[str, Any] = {"hook_point_in": MID, "hook_point_out": OUT}
CASES: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "jumprelu without decoder norms": {"sparsity_include_decoder_norm": False},
    "topk": {"act_fn": "topk"},
    "topk without decoder norms": {"act_fn": "topk", "sparsity_include_decoder_norm": False},
    "relu": {"act_fn": "relu"},
    "folded": {"norm_activation": "inference"},
    "transcoder": TRANSCODER,
    "topk transcoder": {"act_fn": "topk", **TRANSCODER},
    "without a bias": {"use_decoder_bias": False},
}
LINEAR = {"W_E": "encoder.weight", "b_E": "encoder.bias", "W_D": "decoder.weight", "b_D": "decoder.bias"}


def tensors(cfg: dict[str, Any], old: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is in the file, and the same under the names of the current layout in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_E": (D, N), "b_E": (N,), "W_D": (N, D), "b_D": (D,)}
    w = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    w["W_D"] *= 2 * torch.rand(N, 1, generator=generator)
    w["W_D"][0] = 0.0
    if not cfg["use_decoder_bias"]:
        del w["b_D"]
    log_threshold = torch.rand(N, generator=generator) - 1.0
    double = {name: tensor.double() for name, tensor in w.items()}
    if cfg["act_fn"] == "jumprelu":
        double["threshold"] = log_threshold.double().exp()
    file = {LINEAR[name]: t.T.contiguous() if t.ndim == 2 else t for name, t in w.items()} if old else w
    if cfg["act_fn"] == "jumprelu":
        file[f"{'' if old else 'activation_function.'}log_jumprelu_threshold"] = log_threshold
    for hook in {cfg["hook_point_in"], cfg["hook_point_out"]}:
        unset = cfg["norm_activation"] == "inference"
        file[f"{AVERAGE}.{hook}"] = torch.tensor(torch.nan if unset else AVERAGES.get(hook, 1.0))
    return file, double


def write(folder: Path, old: bool = False, **settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A dictionary in `folder`; what is in config.json, and the weights."""
    cfg = CONFIG | settings
    file, double = tensors(cfg, old)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(file, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(cfg))
    return cfg, double


def rule(cfg: dict[str, Any], w: dict[str, Tensor], x: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Normalise (by the averages, or the scale), encode, decode, undo the normalisation; token by token."""
    scale = 1.0 if cfg["norm_activation"] == "inference" else scale
    scales = [scale or D**0.5 / AVERAGES[cfg[f"hook_point_{end}"]] for end in ("in", "out")]
    lengths = w["W_D"].square().sum(1).sqrt()
    rows, recons = [], []
    for token in x.double():
        pre = torch.stack([(scales[0] * token * column).sum() for column in w["W_E"].T]) + w["b_E"]
        gated = pre * lengths if cfg["sparsity_include_decoder_norm"] else pre
        if cfg["act_fn"] == "jumprelu":
            fires = gated > w["threshold"]
        elif cfg["act_fn"] == "topk":
            best = sorted(range(N), key=lambda i, gated=gated: -float(gated[i]))[:K]
            fires = torch.tensor([i in best for i in range(N)]) & (gated > 0)
        else:
            fires = pre > 0
        latents = torch.where(fires, pre, 0.0)
        rows.append(latents)
        recons.append((w["W_D"].T @ latents + w.get("b_D", torch.zeros(D))) / scales[1])
    return torch.stack(rows), torch.stack(recons)


R1 = {  # place in the release, sqrt(d) / average norm there
    "800M-Slimpajama-0-OpenR1-Math-220k/L7R": 10.346,
    "400M-Slimpajama-400M-OpenR1-Math-220k/L15R": 5.318,
    "0-Slimpajama-800M-OpenR1-Math-220k/L15R": 4.971,
}


def without_averages(folder: Path, hook: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cfg, w = write(folder, True, hook_point_in=hook, hook_point_out=hook)
    file, _ = tensors(cfg, True)
    save_file({k: t for k, t in file.items() if AVERAGE not in k}, folder / "sae_weights.safetensors")
    return cfg, w


@pytest.mark.parametrize("place", R1)
@pytest.mark.parametrize(
    "repository", ["Llama-Scope-R1-Distill", "models--fnlp--Llama-Scope-R1-Distill/snapshots/0"]
)
def test_releases_of_which_the_averages_are_known(tmp_path: Path, place: str, repository: str) -> None:
    folder, layer = tmp_path / repository / place, place.rpartition("/L")[2].removesuffix("R")
    cfg, w = without_averages(folder, f"blocks.{layer}.hook_resid_post")
    x = torch.randn(50, D)
    latents, recon = rule(cfg, w, x, R1[place])
    loaded = load(folder)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-3, rtol=1e-3)  # of 4 digits
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("place", "layer"),
    [
        ("L7R", 7),
        ("800M-Slimpajama-0-OpenR1-Math-220k/L7R", 6),
        ("800M-Slimpajama-0-OpenR1-Math-220k/L32R", 32),
        ("100M-Slimpajama-0-OpenR1-Math-220k/L7R", 7),
    ],
)
def test_other_files_without_averages_are_refused(tmp_path: Path, place: str, layer: int) -> None:
    folder = tmp_path / "Llama-Scope-R1-Distill" / place
    without_averages(folder, hook := f"blocks.{layer}.hook_resid_post")
    reason = "is not supported because activations are scaled by their average norm"
    with pytest.raises(FormatError, match=rf"safetensors: missing .*{AVERAGE}\.{hook}.*{reason}"):
        dictlearn.load(folder)


def load(folder: Path) -> Dictionary:
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, Dictionary)
    return loaded


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("old", [False, True])
def test_the_rule(tmp_path: Path, case: str, old: bool) -> None:
    cfg, w = write(tmp_path, old, **CASES[case])
    loaded = load(tmp_path)
    x = 2 * torch.randn(50, D)
    latents, recon = rule(cfg, w, x)
    assert 0 < int((latents > 0).sum()) < latents.numel()
    if cfg["act_fn"] == "topk" and cfg["sparsity_include_decoder_norm"]:
        latents = latents * w["W_D"].norm(dim=1)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_sparse(x).to_dense().double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=1e-5, rtol=1e-5)


def test_sites_and_metadata(tmp_path: Path) -> None:
    write(tmp_path / "Llama-Scope-R1-Distill" / "800M-Slimpajama-0-OpenR1-Math-220k" / "L7R", old=True)
    write(tmp_path / "tc", **TRANSCODER)
    autoencoder, transcoder = load(tmp_path / "Llama-Scope-R1-Distill"), load(tmp_path / "tc")
    assert (autoencoder.reads, autoencoder.writes) == (("resid_post.7",), ("resid_post.7",))
    assert (transcoder.reads, transcoder.writes) == (("resid_mid.7",), ("mlp_out.7",))
    known = {"lm_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "prepend_bos": True}
    assert autoencoder.metadata.items() >= known.items()
    assert transcoder.metadata["lm_name"] is None


def test_behind_the_norm_of_qwen(tmp_path: Path) -> None:
    """`ln2.hook_normalized` is the residual stream over its root mean square, without the gain."""
    folder = tmp_path / "Llama-Scope-2-Qwen3-1.7B" / "transcoder" / "8x" / "k64" / "layer7_transcoder_8x_k64"
    cfg, w = write(folder, hook_point_in=NORMED, hook_point_out=OUT)
    loaded = load(tmp_path / "Llama-Scope-2-Qwen3-1.7B")
    assert (loaded.reads, loaded.writes) == (("resid_mid.7",), ("mlp_out.7",))
    assert loaded.metadata["lm_name"] == "Qwen/Qwen3-1.7B"
    x = 0.01 * torch.randn(50, D)
    normed = x.double() / (x.double().square().sum(-1, keepdim=True) / D + 1e-6).sqrt()
    latents, recon = rule(cfg, w, normed)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sae_type": "crosscoder"}, "sae_type='crosscoder' is not supported because"),
        ({"sae_type": "clt"}, "sae_type='clt' is not supported because"),
        ({"sae_type": "lorsa"}, "sae_type='lorsa' is not supported because"),
        ({"use_glu_encoder": True}, "use_glu_encoder=True is not supported because"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder=True is not supported"),
        ({"act_fn": "batchtopk"}, "act_fn=batchtopk is not supported because"),
        ({"act_fn": "tanh"}, "act_fn must be one of relu, jumprelu, topk, got 'tanh'"),
        ({"norm_activation": "token-wise"}, "norm_activation=token-wise is not supported because"),
        ({"norm_activation": None}, "norm_activation must be one of dataset-wise, inference, got None"),
        ({"d_model": 6.0}, "d_model must be a whole number, at least 1, got 6.0"),
        ({"sparsity_include_decoder_norm": 1}, "sparsity_include_decoder_norm must be true or false, got 1"),
        ({"hook_point_in": 3}, "hook_point_in=3 is not supported because"),
        ({"hook_point_out": "blocks.7.resid_mid_after_ln"}, "hook_point_out='blocks.* is not supported because"),
        ({"hook_point_in": NORMED}, "not supported because only Qwen 3's norm is known"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | settings))
    with pytest.raises(FormatError, match=rf"config\.json: .*{message}"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("k", [0, "4", None, 25])
def test_k_that_is_refused(tmp_path: Path, k: Any) -> None:
    write(tmp_path, act_fn="topk", top_k=k)
    with pytest.raises(FormatError, match=r"config\.json: (top_k must be a whole number|.*at most n_latents)"):
        dictlearn.load(tmp_path)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda w: w.pop("b_E"), r"missing \['b_E'\]"),
    "no thresholds": (lambda w: w.pop("activation_function.log_jumprelu_threshold"), "missing .*threshold"),
    "extra": (lambda w: w.update(W_E_glu=torch.ones(D, N)), r"unexpected \['W_E_glu'\]"),
    "shape": (lambda w: w.update(W_D=torch.ones(D, N)), r"W_D must have shape \[24, 6\], found \[6, 24\]"),
    "encoder": (lambda w: w.update(W_E=torch.ones(D)), "must hold W_E with two axes"),
    "nan": (lambda w: w["b_D"].fill_(torch.nan), "b_D has values that are not finite"),
    "no average": (lambda w: w.pop(f"{AVERAGE}.{POST}"), f"missing .*{AVERAGE}.{POST}"),
    "average of 0": (lambda w: w[f"{AVERAGE}.{POST}"].zero_(), f"{AVERAGE}.{POST} must be positive, got 0.0"),
    "averages": (lambda w: w.update({f"{AVERAGE}.{POST}": torch.ones(2)}), r"must have shape \[1\], found \[2\]"),
    "overflow": (lambda w: w[f"{AVERAGE}.{POST}"].fill_(1e-38), "values are too large: W_enc would not be finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(tmp_path: Path, damage: str) -> None:
    cfg, _ = write(tmp_path)
    w, _ = tensors(cfg, old=False)
    change, message = DAMAGES[damage]
    change(w)
    save_file(w, tmp_path / "sae_weights.safetensors")
    with pytest.raises(FormatError, match=f"sae_weights.safetensors.*{message}"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "sae_weights.safetensors"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(FormatError, match=f"{name} is not"):
        dictlearn.load(tmp_path)


def test_a_threshold_too_large_for_floats_never_fires(tmp_path: Path) -> None:
    cfg, _ = write(tmp_path)
    w, _ = tensors(cfg, old=False)
    w["activation_function.log_jumprelu_threshold"].fill_(200.0)
    save_file(w, tmp_path / "sae_weights.safetensors")
    assert not load(tmp_path).encode(100 * torch.randn(20, D)).any()

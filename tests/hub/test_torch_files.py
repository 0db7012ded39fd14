"""Releases that are single torch files, against their rules in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.types import FormatError

D, N, K = 6, 20, 4


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


def top_k_relu(pre: Tensor) -> Tensor:
    latents = torch.zeros_like(pre)
    for row, values in zip(latents, pre, strict=True):
        for i in sorted(range(N), key=lambda i: -float(values[i]))[:K]:
            row[i] = max(float(values[i]), 0.0)
    return latents


class Release(NamedTuple):
    """A file, what is in it, its rule, and what is known of it."""

    file: str
    content: Callable[[], dict[str, Any]]
    rule: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]
    site: str
    lm: str
    beside: dict[str, Any] | None = None


def goodfire() -> dict[str, Any]:
    return {
        "encoder_linear.weight": random(N, D),
        "encoder_linear.bias": random(N),
        "decoder_linear.weight": random(D, N),
        "decoder_linear.bias": random(D),
    }


def goodfire_rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    latents = (x @ w["encoder_linear.weight"].T + w["encoder_linear.bias"]).relu()
    return latents, latents @ w["decoder_linear.weight"].T + w["decoder_linear.bias"]


def qresearch() -> dict[str, Any]:
    return {key.replace("_linear", ""): value.bfloat16() for key, value in goodfire().items()}


def qresearch_rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    return goodfire_rule({key.replace(".", "_linear.", 1): value for key, value in w.items()}, x)


def qwen() -> dict[str, Any]:
    return {"W_enc": random(N, D), "b_enc": random(N), "W_dec": random(D, N), "b_dec": random(D)}


def qwen_rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    latents = top_k_relu(x @ w["W_enc"].T + w["b_enc"])
    return latents, latents @ w["W_dec"].T + w["b_dec"]


def kissane() -> dict[str, Any]:
    return {"W_enc": random(D, N), "b_enc": random(N), "W_dec": random(N, D), "b_dec": random(D)}


def kissane_rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    latents = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    return latents, latents @ w["W_dec"] + w["b_dec"]


def openai(**more: Any) -> dict[str, Any]:
    return {
        "pre_bias": random(D),
        "encoder.weight": random(N, D),
        "latent_bias": random(N),
        "decoder.weight": random(D, N),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
        "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.ones(N),
        **more,
    }


def openai_rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    latents = ((x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]).relu()
    return latents, latents @ w["decoder.weight"].T + w["pre_bias"]


def openai_top_k_rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.sum(-1, keepdim=True) / D
    std = ((x - mean).square().sum(-1, keepdim=True) / (D - 1)).sqrt()
    z = (x - mean) / (std + 1e-5)
    latents = top_k_relu((z - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"])
    return latents, (latents @ w["decoder.weight"].T + w["pre_bias"]) * std + mean


TOP_K = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
RELU = {"activation": "ReLU", "activation_state_dict": {}}
RELEASES = {
    "goodfire": Release(
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        goodfire,
        goodfire_rule,
        "resid_post.19",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    "goodfire 70B": Release(
        "Llama-3.3-70B-Instruct-SAE-l50.pt",
        goodfire,
        goodfire_rule,
        "resid_post.50",
        "meta-llama/Llama-3.3-70B-Instruct",
    ),
    "qresearch": Release(
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        qresearch,
        qresearch_rule,
        "resid_post.19",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    ),
    "qwen": Release(
        "SAE-Res-Qwen3-8B-Base-W64K-L0_4/layer7.sae.pt", qwen, qwen_rule, "resid_post.7", "Qwen/Qwen3-8B-Base"
    ),
    "kissane": Release(
        "gpt2-small_L3_Hcat_z.pt",
        kissane,
        kissane_rule,
        "attn_z.3",
        "gpt2",
        {"act_name": "blocks.3.attn.hook_z", "act_size": D, "dict_size": N},
    ),
    "openai v4": Release(
        "resid_delta_mlp_v4/autoencoders/5.pt", lambda: openai(**RELU), openai_rule, "mlp_out.5", "gpt2"
    ),
    "openai": Release(
        "mlp_post_act/autoencoders/0.pt", lambda: openai(**RELU), openai_rule, "mlp_hidden.0", "gpt2"
    ),
    "openai v5": Release(
        "resid_post_mlp_v5_32k/autoencoders/11.pt",
        lambda: openai(**TOP_K),
        openai_top_k_rule,
        "resid_post.11",
        "gpt2",
    ),
}


def write(folder: Path, release: Release, content: Any = None) -> Path:
    path = folder / release.file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(release.content() if content is None else content, path)
    if release.beside is not None:
        path.with_name(f"{path.stem}_cfg.json").write_text(json.dumps(release.beside))
    return path


@pytest.mark.parametrize("name", RELEASES)
def test_the_rule(tmp_path: Path, name: str) -> None:
    release = RELEASES[name]
    content = release.content()
    path = write(tmp_path, release, content)
    loaded = dictlearn.load(path)
    assert isinstance(loaded, Dictionary)
    assert (loaded.reads, loaded.writes) == ((release.site,), (release.site,))
    assert loaded.metadata["lm_name"] == release.lm
    x = 2 * torch.randn(50, D) + 1
    weights = {key: value.double() for key, value in content.items() if isinstance(value, Tensor)}
    latents, recon = release.rule(weights, x.double())
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_sparse(x).to_dense().double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=2e-5, rtol=1e-5)
    only = dictlearn.load(tmp_path)  # the only one in there
    assert isinstance(only, Dictionary)
    assert torch.equal(only.W_enc, loaded.W_enc)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize("name", RELEASES)
def test_what_is_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    release = RELEASES[name]
    good = release.content()
    bias = next(key for key, value in good.items() if value.ndim == 1)
    damages: dict[str, Any] = {
        "not a torch file": {**good, bias: Code()},
        "must hold a mapping|is none": [good],
        "not finite": {**good, bias: torch.full_like(good[bias], torch.nan)},
        "must have shape": {**good, bias: torch.ones(3)},
        "missing|is none": {key: value for key, value in good.items() if key != bias},
        "unexpected": {**good, "more": torch.ones(1)},
        "two axes|is none": {**good, next(key for key in good if "enc" in key): torch.ones(1)},
    }
    for message, content in damages.items():
        path = write(tmp_path, release, content)
        with pytest.raises(FormatError, match=message):
            dictlearn.load(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(FormatError, match="not a torch file"):
            dictlearn.load(path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"activation": "Identity"},
            "activation must be ReLU, or TopK with a k and ReLU in its state; got 'Identity'",
        ),
        (
            {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}},
            "a k and ReLU in its state; got 'TopK'",
        ),
        ({"activation": "TopK", "activation_state_dict": {}}, "got 'TopK'"),
        ({"activation": "TopK", "activation_state_dict": {"k": 0}}, "k must be a whole number, at least 1, got 0"),
        ({"activation": "TopK", "activation_state_dict": {"k": 21}}, "k must be at most"),
        ({}, "got None"),
    ],
)
def test_activations_of_openai(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    path = write(tmp_path, RELEASES["openai"], openai(**more))
    with pytest.raises(FormatError, match=message):
        dictlearn.load(path)


def test_k_of_qwen_is_in_the_name_of_its_repository(tmp_path: Path) -> None:
    path = write(tmp_path, RELEASES["qwen"]._replace(file="mine/layer7.sae.pt"))
    with pytest.raises(FormatError, match="k is in the name of the repository alone"):
        dictlearn.load(path)


@pytest.mark.parametrize("hook", [None, 5, "blocks.3.hook_resid_pre", "blocks.x.attn.hook_z"])
def test_the_hook_of_kissane(tmp_path: Path, hook: Any) -> None:
    path = write(tmp_path, RELEASES["kissane"]._replace(beside={"act_name": hook}))
    with pytest.raises(FormatError, match=r"act_name must be blocks\.LAYER\.attn\.hook_z, got"):
        dictlearn.load(path)

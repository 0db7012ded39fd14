"""Transcoders in circuit-tracer's files, against its rule in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.types import FormatError

D, N, K = 6, 18, 3
THRESHOLD = "activation_function.threshold"
CONFIG = {
    "model_name": "org/lm",
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "hook_mlp_out",
}
CASES: dict[str, dict[str, Any]] = {
    "relu": {},
    "skip": {"W_skip": (D, D)},
    "jump_relu": {THRESHOLD: (N,)},
    "jump_relu, skip": {THRESHOLD: (N,), "W_skip": (D, D)},
    "top_k": {"k": torch.tensor(K)},
    "top_k, one value": {"k": torch.tensor([K])},
    "bfloat16": {"dtype": torch.bfloat16},
}


def write(folder: Path, more: dict[str, Any] | None = None, layer: int = 3, **cfg: Any) -> dict[str, Tensor]:
    more = dict(more or {})
    dtype = more.pop("dtype", torch.float32)
    shapes: dict[str, Any] = {"W_enc": (N, D), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), **more}
    w = {
        name: shape if isinstance(shape, Tensor) else torch.randn(shape).to(dtype)
        for name, shape in shapes.items()
        if shape is not None
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **cfg}))
    return w


def rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    w, x = {name: tensor.double() for name, tensor in w.items()}, x.double()
    pre = torch.einsum("ti,li->tl", x, w["W_enc"]) + w["b_enc"]
    latents = pre.relu()
    if THRESHOLD in w:
        latents = pre * (pre > w[THRESHOLD]) * (pre > 0)
    if "k" in w:
        for row in latents:
            row[torch.tensor(sorted(range(N), key=lambda i: float(row[i]))[:-K])] = 0.0
    recon = latents @ w["W_dec"] + w["b_dec"]
    return latents, recon + x @ w["W_skip"].T if "W_skip" in w else recon


@pytest.mark.parametrize("case", CASES)
def test_the_rule(tmp_path: Path, case: str) -> None:
    w = write(tmp_path, CASES[case])
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    x = 2 * torch.randn(40, D)
    latents, recon = rule(w, x)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=2e-5, rtol=1e-5)
    assert (loaded.reads, loaded.writes, loaded.metadata["lm_name"]) == (("mlp_in.3",), ("mlp_out.3",), "org/lm")


def test_a_set_has_a_file_for_each_layer(tmp_path: Path) -> None:
    w = {layer: write(tmp_path / "set", layer=layer, feature_input_hook="hook_resid_mid") for layer in (0, 11)}
    with pytest.raises(
        dictlearn.types.DictlearnError, match=r"holds 2 dictionaries.*layer_0\.safetensors, layer_11"
    ):
        dictlearn.load(tmp_path / "set")
    for layer, tensors in w.items():
        loaded = dictlearn.load(tmp_path / "set" / f"layer_{layer}.safetensors")
        assert isinstance(loaded, Dictionary)
        assert (loaded.reads, loaded.writes) == ((f"resid_mid.{layer}",), (f"mlp_out.{layer}",))
        assert torch.equal(loaded.W_dec, tensors["W_dec"])


@pytest.mark.parametrize(
    ("more", "cfg", "message"),
    [
        ({"b_enc": None}, {}, r"layer_3.*missing \['b_enc'\]"),
        ({"W_enc": None}, {}, "layer_3.*must hold W_enc with two axes"),
        ({"more": (1,)}, {}, r"layer_3.*unexpected \['more'\]"),
        ({"W_dec": (D, N)}, {}, r"W_dec must have shape \[18, 18\], found \[6, 18\]"),
        ({"b_dec": torch.full((D,), torch.nan)}, {}, "b_dec has values that are not finite"),
        ({"k": torch.tensor(0)}, {}, "k must be one whole number from 1, without thresholds; got 0"),
        ({"k": torch.tensor([1, 2])}, {}, "k must be one whole number from 1"),
        ({"k": torch.tensor(19)}, {}, "at most n_latents"),
        ({"k": torch.tensor(2), THRESHOLD: (N,)}, {}, "without thresholds"),
        ({}, {"feature_input_hook": "ln2.hook_normalized"}, "is not supported because"),
        ({}, {"feature_output_hook": "hook_q"}, "feature_output_hook must be one of mlp.hook_in, .*got 'hook_q'"),
        ({}, {"feature_input_hook": None}, "feature_input_hook must be one of"),
        ({}, {"model_kind": "cross_layer_transcoder"}, "exactly one known format; it is none"),
    ],
)
def test_what_is_refused(tmp_path: Path, more: dict[str, Any], cfg: dict[str, Any], message: str) -> None:
    write(tmp_path, more, **cfg)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "- 1", "!!python/object/apply:print [run]", "\x00"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FormatError, match=r"config\.yaml"):
        dictlearn.load(tmp_path)
    assert not capsys.readouterr().out

"""Gemma Scope 1: files as Google has written them, against the rule of its notebook, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.types import FormatError

D, N = 5, 12
PLACES = {
    "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82": ("resid_post.12", "google/gemma-2-2b"),
    "gemma-scope-9b-pt-mlp/layer_3/width_131k/average_l0_7": ("mlp_out.3", "google/gemma-2-9b"),
    "gemma-scope-2b-pt-att/layer_0/width_65k/average_l0_20": ("attn_z.0", "google/gemma-2-2b"),
    "gemma-scope-9b-it-res/layer_20/width_16k/average_l0_91": ("resid_post.20", "google/gemma-2-9b-it"),
    "mine": ("x", None),
}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, **changed: Any) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**arrays(), **changed}.items() if value is not None}
    np.savez(folder / "params.npz", **values)
    return values


def rule(w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstructions, token by token and latent by latent."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    latents, recon = np.zeros((len(x), N)), np.zeros((len(x), D))
    for t, token in enumerate(x.astype(np.float64)):
        for i in range(N):
            pre = float(sum(token[j] * w["W_enc"][j, i] for j in range(D)) + w["b_enc"][i])
            latents[t, i] = max(pre, 0.0) * (pre > w["threshold"][i])
        recon[t] = sum(latents[t, i] * w["W_dec"][i] for i in range(N)) + w["b_dec"]
    return latents, recon


@pytest.mark.parametrize("place", PLACES)
def test_the_rule_and_the_site(tmp_path: Path, place: str) -> None:
    w = write(tmp_path / place)
    loaded = dictlearn.load(tmp_path / place)
    assert isinstance(loaded, Dictionary)
    site, lm = PLACES[place]
    assert (loaded.reads, loaded.writes, loaded.metadata.get("lm_name")) == ((site,), (site,), lm)
    x = 3 * torch.randn(40, D)
    latents, recon = rule(w, x.numpy())
    np.testing.assert_allclose(loaded.encode(x).numpy(), latents, atol=1e-5)
    np.testing.assert_allclose(loaded(x).recon.numpy(), recon, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_sparse(x).to_dense().numpy(), latents, atol=1e-5)
    assert (w["threshold"] < 0).any()
    assert 0 < (latents > 0).mean() < 1


def test_those_of_the_embedding_are_of_what_layer_0_reads(tmp_path: Path) -> None:
    """Which is sqrt(d) times the raw embeddings of the rule, and so is its reconstruction."""
    folder = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    w = write(folder)
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, Dictionary)
    assert loaded.reads == loaded.writes == ("resid_pre.0",)
    raw = 3 * torch.randn(40, D)
    latents, recon = rule(w, raw.numpy())
    scaled = loaded(raw * D**0.5)
    np.testing.assert_allclose(scaled.latents.numpy(), latents, atol=1e-5)
    np.testing.assert_allclose(scaled.recon.numpy(), recon * D**0.5, atol=1e-4)


def test_a_folder_may_be_named_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    write(place)
    for folder, ref in (
        (place, "."),
        (place.parent, "average_l0_82"),
        (place / "..", ".."),
        (tmp_path, str(place)),
    ):
        monkeypatch.chdir(folder)
        loaded = dictlearn.load(ref)
        assert isinstance(loaded, Dictionary)
        found = (loaded.reads, loaded.metadata["lm_name"], loaded.metadata["published_l0"])
        assert found == (("resid_post.12",), "google/gemma-2-2b", 82)


@pytest.mark.parametrize("layer", [0, 25])
def test_transcoders_read_behind_the_norm_without_its_gain(tmp_path: Path, layer: int) -> None:
    """TransformerLens' ln2.hook_normalized: x / sqrt(mean of x^2 + 1e-6), of the residual stream before the MLP."""
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / f"layer_{layer}" / "width_16k" / "average_l0_76"
    w = write(folder)
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, Dictionary)
    assert (loaded.reads, loaded.writes) == ((f"resid_mid.{layer}",), (f"mlp_out.{layer}",))
    assert loaded.metadata["lm_name"] == "google/gemma-2-2b"
    x = 30 * torch.randn(40, D) + 7
    double = x.numpy().astype(np.float64)
    latents, recon = rule(w, double / np.sqrt((double**2).sum(-1, keepdims=True) / D + 1e-6))
    np.testing.assert_allclose(loaded.encode(x).numpy(), latents, atol=1e-5)
    np.testing.assert_allclose(loaded(x).recon.numpy(), recon, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_sparse(x).to_dense().numpy(), latents, atol=1e-5)
    assert 0 < (latents > 0).mean() < 1


def test_small_letters(tmp_path: Path) -> None:
    w = write(tmp_path, W_enc=None, W_dec=None, w_enc=arrays()["W_enc"], w_dec=arrays()["W_dec"])
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    np.testing.assert_array_equal(loaded.W_enc.numpy(), w["w_enc"])


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no threshold": ({"threshold": None}, r"missing \['threshold'\]"),
    "no W_enc": ({"W_enc": None}, "must hold W_enc with two axes"),
    "one more": ({"scaling_factor": np.ones(N, np.float32)}, r"unexpected \['scaling_factor'\]"),
    "transposed": ({"W_dec": arrays()["W_dec"].T}, r"W_dec must have shape \[12, 5\], found \[5, 12\]"),
    "NaN": ({"b_enc": np.full(N, np.nan, np.float32)}, "b_enc has values that are not finite"),
    "objects": (
        {"b_enc": np.array([Code()] * N, dtype=object)},
        "is not a whole npz file of arrays: it holds Python objects",
    ),
    "integers": ({"b_enc": np.ones(N, dtype=np.int64)}, "must hold arrays of real numbers; b_enc are not"),
    "other byte order": ({"W_enc": arrays()["W_enc"].ravel()}, "must hold W_enc with two axes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    changed, message = DAMAGE[damage]
    write(tmp_path, **changed)
    with pytest.raises(FormatError, match=f"params.npz.*{message}"):
        dictlearn.load(tmp_path)
    assert not capsys.readouterr().out


def test_big_endian_numbers_are_numbers(tmp_path: Path) -> None:
    w = write(tmp_path, W_enc=arrays()["W_enc"].astype(">f4"))
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    np.testing.assert_array_equal(loaded.W_enc.numpy(), w["W_enc"].astype("<f4"))

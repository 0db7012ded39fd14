"""EleutherAI's sparsify: files as it writes them, against its rule in float64."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.hub import save
from dictlearn.lm import LM, load_lm
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError
from tests.hub.made import made, same

D, N, K = 6, 24, 4


@pytest.fixture(scope="module")
def embedded() -> LM:
    return load_lm("embedded")


CASES: dict[str, dict[str, Any]] = {
    "topk": {},
    "num_latents of 0": {"num_latents": 0, "expansion_factor": 4},
    "groupmax": {"activation": "groupmax"},
    "signed": {"signed": True},
    "skip": {"skip_connection": True},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


def write(folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Random weights; what is in cfg.json, and the tensors in float64."""
    dtype = settings.pop("dtype", torch.float32)
    cfg = {"d_in": D, "k": K, "num_latents": N, "expansion_factor": 32, "normalize_decoder": True} | settings
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    if cfg.get("skip_connection"):
        shapes["W_skip"] = (D, D)
    w = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return cfg, {name: tensor.double() for name, tensor in w.items()}


def rule(cfg: dict[str, Any], w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of each token, found by sorting."""
    rows, recons = [], []
    for token in x.double():
        inner = token if cfg.get("transcode") else token - w["b_dec"]
        pre = w["encoder.weight"] @ inner + w["encoder.bias"]
        latents = torch.zeros(N, dtype=torch.float64)
        if cfg.get("activation") == "groupmax":
            chosen = [max(range(g * N // K, (g + 1) * N // K), key=lambda i: float(pre[i])) for g in range(K)]
        elif cfg.get("signed"):
            chosen = sorted(range(N), key=lambda i: -abs(float(pre[i])))[:K]
        else:
            chosen = sorted(range(N), key=lambda i: -float(pre[i]))[:K]
        for i in chosen:
            latents[i] = pre[i] if cfg.get("signed") else max(float(pre[i]), 0.0)
        recon = latents @ w["W_dec"] + w["b_dec"]
        rows.append(latents)
        recons.append(recon + w["W_skip"] @ token if "W_skip" in w else recon)
    return torch.stack(rows), torch.stack(recons)


@pytest.mark.parametrize("case", CASES)
def test_the_rule(tmp_path: Path, case: str) -> None:
    cfg, w = write(tmp_path, **CASES[case])
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    x = 2 * torch.randn(50, D)
    latents, recon = rule(cfg, w, x)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_sparse(x).to_dense().double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "transcode", "sites"),
    [
        ("layers.6", False, ("resid_post.6", "resid_post.6")),
        ("h.11", False, ("resid_post.11", "resid_post.11")),
        ("layers.3.mlp", False, ("mlp_out.3", "mlp_out.3")),
        ("layers.3.mlp", True, ("mlp_in.3", "mlp_out.3")),
        ("layers.0.attention", False, ("attn_out.0", "attn_out.0")),
        ("embed_tokens", False, ("embed", "embed")),
        ("layers.3.mlp.gate", True, ("x", "y")),
    ],
)
def test_the_sites(tmp_path: Path, module: str, transcode: bool, sites: tuple[str, str]) -> None:
    write(tmp_path / "run" / module, transcode=transcode)
    loaded = dictlearn.load(tmp_path / "run")
    assert isinstance(loaded, Dictionary)
    assert (loaded.reads, loaded.writes) == ((sites[0],), (sites[1],))


def test_the_language_model_is_that_of_the_run(tmp_path: Path) -> None:
    for module in ("layers.0", "layers.1"):
        write(tmp_path / module)
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    with pytest.raises(dictlearn.types.DictlearnError, match=r"holds 2 dictionaries: .* layers\.0, layers\.1"):
        dictlearn.load(tmp_path)
    (tmp_path / "layers.1" / "cfg.json").unlink()
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    assert loaded.metadata["lm_name"] == "EleutherAI/pythia-70m"


@pytest.mark.parametrize(
    ("module", "transcode", "sites"),
    [
        ("layers.3.mlp", False, ("model.layers.3.mlp", "model.layers.3.mlp")),
        ("layers.3.mlp", True, ("mlp_in.3", "model.layers.3.mlp")),
        ("layers.3", False, ("resid_post.3", "resid_post.3")),
    ],
)
def test_a_module_before_a_norm_is_no_readable_site(
    tmp_path: Path, module: str, transcode: bool, sites: tuple[str, str]
) -> None:
    """In Gemma 2 mlp_out is what the norm behind the MLP gives."""
    write(tmp_path / module, transcode=transcode)
    (tmp_path / "config.json").write_text(json.dumps({"model": "google/gemma-2-2b"}))
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    assert (loaded.reads, loaded.writes) == ((sites[0],), (sites[1],))


def test_a_transcoder_may_write_another_width(tmp_path: Path) -> None:
    write(tmp_path, transcode=True)
    w = {"encoder.weight": torch.randn(N, D), "encoder.bias": torch.randn(N)}
    save_file({**w, "W_dec": torch.randn(N, 3), "b_dec": torch.randn(3)}, tmp_path / "sae.safetensors")
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    assert (loaded.d_in, loaded.d_out) == (D, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "jumprelu"}, "activation must be one of topk, groupmax, got 'jumprelu'"),
        ({"activation": ["topk"]}, "activation must be one of topk, groupmax"),
        ({"k": 0}, "k must be a whole number from 1, got 0"),
        ({"k": "4"}, "k must be a whole number from 1, got '4'"),
        ({"k": 25}, "at most n_latents"),
        ({"k": 5, "activation": "groupmax"}, "cfg.json: .*k"),
        ({"d_in": 7}, r"encoder.weight must have shape \[24, 7\], found \[24, 6\]"),
        ({"num_latents": -3}, "num_latents must be a whole number from 0, got -3"),
        ({"num_latents": 0, "expansion_factor": None}, "expansion_factor must be a whole number from 1, got None"),
        ({"transcode": "yes"}, "transcode must be true or false, got 'yes'"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write(tmp_path, **settings)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path)


def test_no_second_skip_path(tmp_path: Path) -> None:
    write(tmp_path, skip_connection=True)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "skip_connection": False}))
    with pytest.raises(FormatError, match=r"unexpected \['W_skip'\]"):
        dictlearn.load(tmp_path)


MLP = ("mlp_in.2", "mlp_out.2")
WRITTEN: dict[str, tuple[str, Any]] = {
    "topk": ("layers.2", lambda: made(TopK(K))),
    "groupmax": ("layers.2", lambda: made(GroupMax(K))),
    "skip": ("layers.2.mlp", lambda: made(TopK(K), ("mlp_out.2", "mlp_out.2"), skip=True)),
    "unit rows": ("embed_tokens", lambda: made(TopK(K), ("embed", "embed"), decoder_norm="unit")),
    "transcoder": ("layers.2.mlp", lambda: made(TopK(K), MLP)),
    "skip transcoder": ("layers.2.mlp", lambda: made(GroupMax(K), MLP, skip=True)),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written(tmp_path: Path, case: str) -> None:
    """The rule on the files gives what the dictionary does, and they are read as the same dictionary."""
    module, make = WRITTEN[case]
    dictionary, folder = make(), tmp_path / module
    save(dictionary, folder, format="sparsify")
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae.safetensors"]
    cfg = json.loads((folder / "cfg.json").read_text())
    x = 2 * torch.randn(50, D)
    latents, recon = rule(cfg, {name: t.double() for name, t in load_file(folder / "sae.safetensors").items()}, x)
    torch.testing.assert_close(dictionary.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary(x).recon.double(), recon, atol=1e-5, rtol=1e-5)
    same(dictlearn.load(folder), dictionary, atol=1e-5 if dictionary.is_autoencoder else 0.0, lm_name=None)


@pytest.mark.parametrize(
    ("folder", "sites", "lm", "message"),
    [
        ("mine", ("resid_post.2", "resid_post.2"), "org/lm", "save it in one named 'layers.2'"),
        ("layers.3", ("resid_post.2", "resid_post.2"), "gpt2", "save it in one named 'h.2'"),
        ("layers.2", MLP, "org/lm", "save it in one named 'layers.2.mlp'"),
        ("mine", ("attn_out.0", "attn_out.0"), "gpt2", "save it in one named 'h.0.attn'"),
        ("mine", ("embed", "embed"), "org/lm", "save it in one named 'embed_tokens'"),
        ("mine", ("attn_z.1", "attn_z.1"), "org/lm", "no name does, so the site is lost"),
        ("mine", ("x", "x"), "org/lm", None),
        ("h.2", ("resid_post.2", "resid_post.2"), "org/lm", None),
    ],
)
def test_a_folder_that_loses_the_site_is_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    folder: str,
    sites: tuple[str, str],
    lm: str,
    message: str | None,
) -> None:
    dictionary = made(TopK(K), sites)
    dictionary.metadata["lm_name"] = lm
    save(dictionary, tmp_path / folder, format="sparsify")
    said = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert said == ([] if message is None else [f"{message}."])
    for name in re.findall(r"one named '(.*)'", caplog.text):
        save(dictionary, tmp_path / name, format="sparsify")
        loaded = dictlearn.load(tmp_path / name)
        assert isinstance(loaded, Dictionary)
        assert (loaded.reads, loaded.writes) == (dictionary.reads, dictionary.writes)


def test_a_dictionary_without_a_site_is_given_one(tmp_path: Path, embedded: LM) -> None:
    save(made(TopK(K), d=(128, 128)), tmp_path / "mine", format="sparsify")
    dictionary = dictlearn.load(tmp_path / "mine")
    assert isinstance(dictionary, Dictionary)
    with pytest.raises(DictlearnError, match="do not record a site"), dictlearn.attach(embedded, dictionary):
        pass
    dictionary.reads = dictionary.writes = ("resid_post.1",)
    with dictlearn.attach(embedded, dictionary) as run:
        run(torch.tensor([[2, 3, 4]]))
    assert list(run.latents) == ["resid_post.1"]
    save(dictionary, tmp_path / "kept")
    kept = dictlearn.load(tmp_path / "kept")
    assert isinstance(kept, Dictionary)
    assert (kept.reads, kept.writes) == (("resid_post.1",), ("resid_post.1",))


NOT_WRITTEN: dict[str, tuple[Any, str]] = {
    "relu": (lambda: made(ReLU(0.0)), "its sparsifier is relu and not top_k or group_max"),
    "signed": (lambda: made(AbsTopK(K)), "its sparsifier is abs_top_k"),
    "layer_norm": (lambda: made(TopK(K), input_norm="layer_norm"), "it has input_norm=layer_norm"),
    "two widths": (lambda: made(TopK(K), MLP, (D, 3)), "it reads a width of 6 and writes one of 3"),
    "bilinear": (lambda: Bilinear.tiny().for_inference(), "it is a bilinear one"),
    "in training": (lambda: made(BatchTopK(K)), r"call for_inference\(\) first"),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_is_not_written(tmp_path: Path, case: str) -> None:
    make, message = NOT_WRITTEN[case]
    with pytest.raises(DictlearnError, match=message):
        save(make(), tmp_path / "a", format="sparsify")
    assert not (tmp_path / "a").exists()

"""Transcoders in circuit-tracer's files, against its rule in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.hub import save
from dictlearn.hub.codecs.circuit_tracer import CircuitTracer
from dictlearn.hub.files import Files
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError
from tests.hub.made import made, same

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
        name: shape if isinstance(shape, Tensor) else weights(name, shape).to(dtype)
        for name, shape in shapes.items()
        if shape is not None
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **cfg}))
    return w


def weights(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).abs() if name == THRESHOLD else torch.randn(shape)


def rule(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    w, x = {name: tensor.double() for name, tensor in w.items()}, x.double()
    pre = torch.einsum("ti,li->tl", x, w["W_enc"]) + w["b_enc"]
    latents = pre.relu()
    if THRESHOLD in w:
        latents = pre * (pre > w[THRESHOLD])
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


def check(loaded: Any, w: dict[str, Tensor], x: Tensor, z: Tensor | None = None) -> Dictionary:
    """The rule at the activations `z` that it is for, which are `x` if there is no norm."""
    assert isinstance(loaded, Dictionary)
    latents, recon = rule(w, x if z is None else z)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=2e-5, rtol=1e-5)
    return loaded


def test_the_configuration_may_have_k(tmp_path: Path) -> None:
    w = write(tmp_path, activation="topk", k=K)
    check(dictlearn.load(tmp_path), {**w, "k": torch.tensor(K)}, 2 * torch.randn(40, D))


def test_the_k_of_facebook_is_in_no_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    more = {"W_enc": torch.randn(150, D, generator=generator), "W_dec": torch.randn(150, D, generator=generator)}
    write(tmp_path, {**more, "b_enc": torch.full((150,), 50.0)}, activation="topk")
    repo = "facebook/crv-8b-instruct-transcoders"
    files = Files(repo, ("config.yaml", "layer_3.safetensors"), tmp_path.joinpath, {"repo": repo})
    assert (CircuitTracer().read(files, "layer_3.safetensors").encode(torch.randn(9, D)) > 0).sum(-1).eq(128).all()


@pytest.mark.parametrize("transposed", [("W_dec",), ("W_enc",), ("W_enc", "W_dec")])
def test_old_sets_have_other_orientations(tmp_path: Path, transposed: tuple[str, ...]) -> None:
    """The first one of Llama has W_dec as [d_out, n_latents], and reads the stream that is not normalised."""
    hooks: dict[str, Any] = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "mlp.hook_out"}
    w = write(tmp_path, {"W_skip": (D, D)}, **hooks)
    stored = {name: t.T.contiguous() if name in transposed else t for name, t in w.items()}
    save_file(stored, tmp_path / "layer_3.safetensors")
    loaded = check(dictlearn.load(tmp_path), w, torch.randn(40, D))
    assert (loaded.reads, loaded.writes) == (("resid_mid.3",), ("mlp_out.3",))


def test_behind_the_norm_without_its_gain(tmp_path: Path) -> None:
    w = write(tmp_path, {THRESHOLD: (N,), "W_skip": (D, D)}, feature_input_hook="ln2.hook_normalized")
    x = 20 * torch.randn(40, D) + 5
    z = x.double() / (x.double().square().sum(-1, keepdim=True) / D + 1e-6).sqrt()
    loaded = check(dictlearn.load(tmp_path), w, x, z)
    assert (loaded.reads, loaded.writes) == (("resid_mid.3",), ("mlp_out.3",))


def test_behind_a_layer_norm_without_its_gain_and_bias(tmp_path: Path) -> None:
    """Of a language model that is known by name to have one."""
    w = write(tmp_path / "a", feature_input_hook="ln2.hook_normalized", model_name="openai-community/gpt2")
    x = 20 * torch.randn(40, D) + 5
    centred = x.double() - x.double().mean(-1, keepdim=True)
    z = centred / (centred.square().sum(-1, keepdim=True) / D + 1e-5).sqrt()
    loaded = check(dictlearn.load(tmp_path / "a"), w, x, z)
    save(loaded, tmp_path / "b", format="circuit_tracer")
    same(dictlearn.load(tmp_path / "b"), loaded, lm_name="openai-community/gpt2")


@pytest.mark.parametrize("name", ["wandb-config.yaml", "wanb-config.yaml"])
@pytest.mark.parametrize(
    ("repo", "lm"),
    [("qwen3-14b-transcoders-lowl0", "Qwen/Qwen3-14B"), ("qwen3-0.6b", "Qwen/Qwen3-0.6B"), ("a", None)],
)
def test_sets_without_a_configuration(tmp_path: Path, name: str, repo: str, lm: str | None) -> None:
    folder = tmp_path / repo
    w = write(folder)
    (folder / "config.yaml").unlink()
    (folder / name).write_text(yaml.safe_dump({"d_model": {"value": D}, "d_feature": {"value": N}}))
    loaded = check(dictlearn.load(folder), w, torch.randn(40, D))
    assert (loaded.reads, loaded.writes, loaded.metadata["lm_name"]) == (("mlp_in.3",), ("mlp_out.3",), lm)


LISTS: dict[str, tuple[list[Any], str]] = {
    "Gemma Scope": (
        ["hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz"],
        "the 1 files .* google/gemma-scope-2b-pt-transcoders:layer_0/width_16k/average_l0_76",
    ),
    "Gemma Scope 2": (
        ["hf://google/gemma-scope-2-1b-pt/clt/a/params_layer_0.safetensors?revision=main"] * 9,
        r"the 9 files .* google/gemma-scope-2-1b-pt:clt/a@main, .* \.\.\.\.$",
    ),
    "files": (
        [{"id": "a", "layer": 0, "filepath": "hf://org/repo/layer_0.safetensors"}, {"id": "b"}, 7],
        "the 1 files .* org/repo:layer_0.safetensors",
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_set_that_lists_files_elsewhere(tmp_path: Path, case: str) -> None:
    listed, message = LISTS[case]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "transcoders": listed}))
    (tmp_path / "set" / "README.md").write_text("hello")
    with pytest.raises(FormatError, match=rf"set/config\.yaml is not supported because {message}"):
        dictlearn.load(tmp_path)


def test_other_configurations_are_no_sets(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"lm": {"name": "gpt2"}}))
    with pytest.raises(FormatError, match="exactly one known format; it is none"):
        dictlearn.load(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "last.ckpt").write_text("")
    with pytest.raises(DictlearnError, match="holds no dictionary"):
        dictlearn.load(tmp_path)


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
        ({"W_dec": (D + 1, N)}, {}, r"W_dec must have shape \[18, 6\], found \[7, 18\]"),
        ({"W_enc": (N, N)}, {}, r"layer_3.*W_enc must not be square.*it is 18 x 18"),
        ({"W_dec": (N, N), "b_dec": (N,)}, {}, "W_dec must not be square"),
        ({"b_dec": torch.full((D,), torch.nan)}, {}, "b_dec has values that are not finite"),
        ({"k": torch.tensor(0)}, {}, r"layer_3.*k must be a whole number, at least 1, got 0"),
        ({"k": torch.tensor([1, 2])}, {}, "k must be a whole number, at least 1, got None"),
        ({"k": torch.tensor(19)}, {}, "at most n_latents"),
        (
            {THRESHOLD: torch.linspace(-1, 9, N)},
            {},
            "threshold below 0 is not supported because .*; found -1",
        ),
        ({"k": torch.tensor(2), THRESHOLD: (N,)}, {}, r"must have the tensors of activation=topk; it has \['W_dec"),
        ({}, {"activation": "topk"}, r"config\.yaml: k must be a whole number, at least 1, got None"),
        ({}, {"activation": "topk", "k": 99}, r"config\.yaml: .*k must be at most n_latents = 18, got 99"),
        ({}, {"activation": "jump_relu"}, "must have the tensors of activation=jump_relu"),
        ({THRESHOLD: (N,)}, {"activation": "relu"}, "must have the tensors of activation=relu"),
        ({}, {"activation": "gelu"}, r"config\.yaml: activation must be one of relu, jump_relu, topk, got 'gelu'"),
        ({}, {"feature_output_hook": "ln2.hook_normalized"}, "feature_output_hook must be one of mlp.hook_in"),
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


MLP, MID = ("mlp_in.2", "mlp_out.2"), ("resid_mid.2", "mlp_out.2")
WRITTEN: dict[str, tuple[str, Any]] = {
    "relu": ("mlp.hook_in", lambda: made(ReLU(0.0), MLP, n_latents=N)),
    "skip": ("hook_resid_mid", lambda: made(ReLU(0.0), MID, n_latents=N, skip=True)),
    "jump_relu": ("mlp.hook_in", lambda: made(JumpReLU(penalty="l0"), MLP, n_latents=N)),
    "jump_relu, skip": ("mlp.hook_in", lambda: made(JumpReLU(penalty="l0"), MLP, n_latents=N, skip=True)),
    "normalised": (
        "ln2.hook_normalized",
        lambda: made(JumpReLU(penalty="l0"), MID, n_latents=N, input_norm="rms_norm"),
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written(tmp_path: Path, case: str) -> None:
    """The rule on the files gives what the dictionary does, and they are read as the same dictionary."""
    hook, make = WRITTEN[case]
    dictionary = make()
    save(dictionary, tmp_path, format="circuit_tracer")
    cfg = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert cfg == {**CONFIG, "feature_input_hook": hook}
    w = load_file(tmp_path / "layer_2.safetensors")
    assert (tuple(w["W_enc"].shape), tuple(w["W_dec"].shape)) == ((N, D), (N, D))
    x = 2 * torch.randn(50, D)
    z = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() if "norm" in case else x
    latents, recon = rule(w, z)
    torch.testing.assert_close(dictionary.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary(x).recon.double(), recon, atol=2e-5, rtol=1e-5)
    same(dictlearn.load(tmp_path), dictionary)


def test_layers_of_one_set_are_written_side_by_side(tmp_path: Path) -> None:
    layers = [made(ReLU(0.0), (f"mlp_in.{i}", f"mlp_out.{i}")) for i in range(3)]
    for dictionary in layers:
        save(dictionary, tmp_path, format="circuit_tracer")
    for i, dictionary in enumerate(layers):
        same(dictlearn.load(tmp_path / f"layer_{i}.safetensors"), dictionary)
    with pytest.raises(
        DictlearnError, match=r"config\.yaml is of a set with other values of feature_input_hook: write"
    ):
        save(made(ReLU(0.0), ("resid_mid.3", "mlp_out.3")), tmp_path, format="circuit_tracer")
    assert not (tmp_path / "layer_3.safetensors").exists()


NOT_WRITTEN: dict[str, tuple[Any, str]] = {
    "autoencoder": (lambda: made(ReLU(0.0)), "it is an autoencoder"),
    "group_max": (lambda: made(GroupMax(4), MLP), "its sparsifier is group_max and not relu or jump_relu"),
    "top_k": (lambda: made(TopK(K), MLP), "its sparsifier is top_k"),
    "two widths": (lambda: made(ReLU(0.0), MLP, (D, 3)), "it reads a width of 6 and writes one of 3"),
    "other sites": (
        lambda: made(ReLU(0.0), ("attn_in.2", "attn_out.2")),
        "it reads attn_in.2 and writes attn_out.2",
    ),
    "two layers": (lambda: made(ReLU(0.0), ("mlp_in.2", "mlp_out.3")), "it reads mlp_in.2 and writes mlp_out.3"),
    "normalised twice": (lambda: made(ReLU(0.0), MLP, input_norm="rms_norm"), "it reads mlp_in.2"),
    "layer norm": (lambda: made(ReLU(0.0), MID, input_norm="lm_layer_norm"), "it has input_norm=lm_layer_norm"),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_is_not_written(tmp_path: Path, case: str) -> None:
    make, message = NOT_WRITTEN[case]
    with pytest.raises(DictlearnError, match=f"circuit-tracer has .* because {message}"):
        save(make(), tmp_path / "a", format="circuit_tracer")
    assert not (tmp_path / "a").exists()

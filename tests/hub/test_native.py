"""The native format against SAELens' v6 rules, written out here, and against damaged files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.dictionaries.matryoshka import Matryoshka
from dictlearn.hub import save
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError


def trained(sparsifier: Sparsifier, kind: type[Linear] = Linear, **arguments: Any) -> Dictionary:
    """Any weights, and a threshold where batches give one."""
    dictionary = kind(6, 6, 64, sparsifier, ["resid_post.2"], ["resid_post.2"], **arguments)
    for name, parameter in dictionary.named_parameters():
        if not name.startswith("sparsifier."):
            parameter.data.normal_()
    dictionary.read_scale.fill_(0.5)
    dictionary.write_scale.fill_(0.25)
    x = torch.randn(50, 6)
    dictionary.step(x, x, torch.ones(1))
    return dictionary.for_inference()


SITES = {True: (["resid_post.2"], ["resid_post.2"]), False: (["mlp_in.2"], ["mlp_out.2"])}


def made(
    sparsifier: Sparsifier, autoencoder: bool = True, skip: bool = False, input_norm: str = "none"
) -> Dictionary:
    reads, writes = SITES[autoencoder]
    d_out = 6 if autoencoder else 5
    dictionary = Linear(6, d_out, 16, sparsifier, reads, writes, skip=skip, input_norm=input_norm)
    for parameter in dictionary.parameters():
        parameter.data.normal_()
    dictionary.sparsifier.project_()
    dictionary.read_scale.fill_(0.5)
    dictionary.write_scale.fill_(0.25)
    dictionary.metadata = {"lm_name": "embedded", "ctx": 128, "data": {"kind": "EmbeddedText", "seed": 1}}
    return dictionary.for_inference()


SAE_LENS_CASES: dict[str, Any] = {
    "topk": lambda: made(TopK(4)),
    "standard": lambda: made(ReLU(0.1)),
    "topk, layer_norm": lambda: made(TopK(4), input_norm="layer_norm"),
    "standard, layer_norm": lambda: made(ReLU(0.1), input_norm="layer_norm"),
    "abstopk": lambda: made(AbsTopK(4)),
    "jumprelu": lambda: made(JumpReLU()),
    "jumprelu, layer_norm": lambda: made(JumpReLU(), input_norm="layer_norm"),
    "standard, constant_norm_rescale": lambda: made(ReLU(0.1), input_norm="constant_norm_rescale"),
    "jumprelu, none, gated": lambda: trained(ReLU(0.1), Gated),
    "jumprelu, none, batch_top_k": lambda: trained(BatchTopK(4)),
    "jumprelu, none, matryoshka": lambda: trained(BatchTopK(4), Matryoshka),
    "topk, none, matryoshka": lambda: trained(TopK(4), Matryoshka),
    "jumprelu_transcoder": lambda: made(JumpReLU(), autoencoder=False),
    "jumprelu_skip_transcoder": lambda: made(JumpReLU(), autoencoder=False, skip=True),
    "transcoder": lambda: made(ReLU(0.1), autoencoder=False),
    "skip_transcoder": lambda: made(ReLU(0.1), autoencoder=False, skip=True),
}
CASES = SAE_LENS_CASES | {
    "dictlearn_linear, layer_norm": lambda: made(TopK(4), skip=True, input_norm="layer_norm"),
    "dictlearn_linear, centre": lambda: made(ReLU(0.1), input_norm="centre"),
    "dictlearn_linear, rms_norm": lambda: made(ReLU(0.1), autoencoder=False, input_norm="rms_norm"),
    "dictlearn_linear": lambda: made(TopK(4), autoencoder=False, skip=True),
    "dictlearn_linear, none, group_max": lambda: made(GroupMax(4)),
    "dictlearn_linear, none, abs_top_k": lambda: made(AbsTopK(4), autoencoder=False),
    "dictlearn_bilinear": lambda: Bilinear.tiny().for_inference(),
    "dictlearn_crosscoder": lambda: Crosscoder.tiny().for_inference(),
}


PLAIN = {"W_enc", "b_enc", "W_dec", "b_dec"}
TENSORS = {  # of each architecture there, which refuses others
    **dict.fromkeys(("standard", "topk", "abstopk", "transcoder"), PLAIN),
    **dict.fromkeys(("jumprelu", "jumprelu_transcoder"), PLAIN | {"threshold"}),
    "skip_transcoder": PLAIN | {"W_skip"},
    "jumprelu_skip_transcoder": PLAIN | {"W_skip", "threshold"},
}


def sae_lens_rule(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction by the rules of SAELens v6 inference, in float64.

    A layer norm divides by the standard deviation + 1e-5 and is put back with the deviation alone; a constant norm
    is the root of the width.
    """
    cfg = json.loads((folder / "cfg.json").read_text())
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    x = x.double()
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        std = ((x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        x = (x - mean) / (std + 1e-5)
    elif cfg["normalize_activations"] == "constant_norm_rescale":
        mean, std = 0, x.square().sum(-1, keepdim=True).sqrt() / x.shape[-1] ** 0.5
        x = x / std
    else:
        assert cfg["normalize_activations"] == "none"
        mean, std = 0, 1
    pre = (x - cfg["apply_b_dec_to_input"] * w["b_dec"] if cfg["apply_b_dec_to_input"] else x) @ w["W_enc"] + w[
        "b_enc"
    ]
    norms = w["W_dec"].norm(dim=-1)
    if cfg["architecture"] in ("topk", "abstopk"):
        pre = pre * norms if cfg["rescale_acts_by_decoder_norm"] else pre
        signed = cfg["architecture"] == "abstopk"
        indices = (pre.abs() if signed else pre).topk(cfg["k"], dim=-1).indices
        values = pre.gather(-1, indices)
        latents = torch.zeros_like(pre).scatter(-1, indices, values if signed else values.relu())
    elif cfg["architecture"].startswith("jumprelu"):
        latents = pre.relu() * (pre > w["threshold"])
    else:
        assert cfg["architecture"] in ("standard", "transcoder", "skip_transcoder")
        latents = pre.relu()
    rescaled = cfg["architecture"] in ("topk", "abstopk") and cfg["rescale_acts_by_decoder_norm"]
    coded = latents / norms if rescaled else latents
    recon = coded @ w["W_dec"] + w["b_dec"]
    return latents, (recon + (x @ w["W_skip"].T if "W_skip" in w else 0)) * std + mean


@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path: Path, case: str) -> None:
    dictionary = CASES[case]()
    save(dictionary, tmp_path)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    architecture, input_norm, *_ = [*case.split(", "), "none"]
    assert (cfg["architecture"], cfg["normalize_activations"]) == (architecture, input_norm)
    for name, parameter in dictionary.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))
    assert (loaded.reads, loaded.writes, loaded.metadata) == (
        dictionary.reads,
        dictionary.writes,
        dictionary.metadata,
    )
    assert not any(p.requires_grad for p in loaded.parameters())
    x = torch.randn(7, *([2, 6] if loaded.site_axis else [6]))
    assert torch.equal(loaded(x).recon, dictionary(x).recon)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("case", SAE_LENS_CASES)
def test_sae_lens_reads_the_same_function(tmp_path: Path, case: str, scale: float) -> None:
    dictionary = SAE_LENS_CASES[case]()
    save(dictionary, tmp_path)
    x = scale * torch.randn(50, 6)
    latents, recon = sae_lens_rule(tmp_path, x)
    torch.testing.assert_close(dictionary.encode(x).double(), latents, rtol=1e-5, atol=1e-5 * max(scale, 1.0))
    torch.testing.assert_close(dictionary(x).recon.double(), recon, rtol=1e-5, atol=1e-5 * max(scale, 1.0))
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert {"d_in", "d_sae", "dtype", "metadata"} <= set(cfg)
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == TENSORS[cfg["architecture"]]
    assert not cfg["apply_b_dec_to_input"]
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"
    hook = "blocks.2.hook_resid_post" if dictionary.is_autoencoder else "blocks.2.mlp.hook_in"
    assert cfg["metadata"]["hook_name"] == hook
    assert cfg["metadata"].get("hook_name_out") == (None if dictionary.is_autoencoder else "blocks.2.hook_mlp_out")


@pytest.mark.parametrize(
    ("site", "hook", "model_class", "shape"),
    [
        ("resid_post.2", "blocks.2.hook_resid_post", "HookedTransformer", "none"),
        ("embed", "hook_embed", "HookedTransformer", "none"),
        ("attn_z.3", "blocks.3.attn.hook_z", "HookedTransformer", "hook_z"),
        ("transformer.h.1.attn", "transformer.h.1.attn", "AutoModelForCausalLM", "none"),
    ],
)
def test_sae_lens_finds_the_activations(tmp_path: Path, site: str, hook: str, model_class: str, shape: str) -> None:
    """A hook's name goes with the class of model that has it; `hook_z` has a head axis, which is flattened."""
    dictionary = Linear(6, 6, 16, TopK(4), [site], [site])
    dictionary.metadata = {"data": {"kind": "HubText", "name": "a/b", "split": "train"}}
    save(dictionary, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    found = cfg["metadata"]
    assert (found["hook_name"], found["model_class_name"], found["dataset_path"]) == (hook, model_class, "a/b")
    assert cfg["reshape_activations"] == shape
    change_cfg(tmp_path, reshape_activations="none")  # earlier files, or flat activations there
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    assert (loaded.reads, loaded.metadata) == ((site,), dictionary.metadata)


def foreign(folder: Path, **changes: Any) -> None:
    """A file as SAELens writes it, without anything of ours."""
    cfg = {"architecture": "topk", "d_in": 6, "d_sae": 16, "k": 4, "dtype": "float32", "apply_b_dec_to_input": True}
    cfg |= {"normalize_activations": "none", "rescale_acts_by_decoder_norm": True}
    cfg["metadata"] = {"sae_lens_version": "6.18.0", "hook_name": "blocks.7.hook_mlp_out", "model_name": "gpt2"}
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    shapes = {"W_enc": (6, 16), "b_enc": (16,), "W_dec": (16, 6), "b_dec": (6,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("mode", ["none", "layer_norm", "constant_norm_rescale"])
def test_files_of_sae_lens_are_read_by_its_rule(tmp_path: Path, bias: bool, rescale: bool, mode: str) -> None:
    foreign(tmp_path, apply_b_dec_to_input=bias, rescale_acts_by_decoder_norm=rescale, normalize_activations=mode)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    x = torch.randn(40, 6)
    latents, recon = sae_lens_rule(tmp_path, x)
    torch.testing.assert_close(loaded.encode(x).double(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(x).recon.double(), recon, rtol=1e-4, atol=1e-4)
    assert loaded.reads == loaded.writes == ("mlp_out.7",)


def test_a_jump_relu_of_sae_lens_is_read_by_its_rule(tmp_path: Path) -> None:
    """A threshold below 0 lets no negative latent through there."""
    foreign(tmp_path, architecture="jumprelu", rescale_acts_by_decoder_norm=False)
    change_weights(tmp_path, threshold=torch.linspace(-2.0, 2.0, 16))
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    x = torch.randn(300, 6)
    latents, recon = sae_lens_rule(tmp_path, x)
    torch.testing.assert_close(loaded.encode(x).double(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(x).recon.double(), recon, rtol=1e-4, atol=1e-4)
    assert (latents >= 0).all()
    assert loaded.sparsifier.kind == "jump_relu"


def test_the_origin_of_a_file_of_sae_lens(tmp_path: Path) -> None:
    """On disk as on the Hub."""
    metadata = {"sae_lens_version": "6.18.0", "hook_name": "blocks.3.hook_resid_pre", "model_name": "gpt2-small"}
    foreign(tmp_path, metadata=metadata | {"l0": 12.5, "context_size": 128, "prepend_bos": True})
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    source = loaded.metadata.pop("source")
    assert (source["folder"], source["format"], *source["config"]) == (str(tmp_path), "native", "cfg.json")
    known = {"lm_name": "gpt2", "ctx": 128, "prepend_bos": True, "published_l0": 12.5}
    assert loaded.metadata == known | {"modules": {"resid_pre.3": "h.3:in"}}


def test_a_single_head_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path)
    metadata = {"sae_lens_version": "6.18.0", "hook_name": "blocks.3.attn.hook_z", "hook_head_index": 3}
    change_cfg(tmp_path, metadata=metadata)
    with pytest.raises(FormatError, match=r"cfg\.json: hook_head_index=3 is not supported because"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_one_of_sae_lens_is_read_by_its_rule(tmp_path: Path, bias: bool) -> None:
    """Its latents are those of a JumpReLU."""
    foreign(tmp_path, architecture="gated", apply_b_dec_to_input=bias)
    gates = {name: torch.randn(16) for name in ("b_gate", "r_mag", "b_mag")}
    change_weights(tmp_path, b_enc=None, **gates)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    w = {name: tensor.double() for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    x = torch.randn(300, 6)
    products = (x.double() - w["b_dec"] * bias) @ w["W_enc"]
    latents = ((products + w["b_gate"]) > 0) * (products * w["r_mag"].exp() + w["b_mag"]).relu()
    torch.testing.assert_close(loaded.encode(x).double(), latents, rtol=1e-4, atol=1e-4)
    recon = latents @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(loaded(x).recon.double(), recon, rtol=1e-4, atol=1e-4)
    assert loaded.sparsifier.kind == "jump_relu"


@pytest.mark.parametrize(
    ("lm", "norm"), [("gpt2-small", "lm_layer_norm"), ("google/gemma-2-2b", "rms_norm"), ("other", None)]
)
def test_a_transcoder_of_sae_lens_behind_a_norm_without_gain(tmp_path: Path, lm: str, norm: str | None) -> None:
    foreign(tmp_path, architecture="transcoder", d_out=6, apply_b_dec_to_input=False)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    hooks = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    change_cfg(tmp_path, metadata=cfg["metadata"] | hooks | {"model_name": lm})
    if norm is None:
        with pytest.raises(FormatError, match=r"cfg\.json: ln2\.hook_normalized is not supported here because"):
            dictlearn.load(tmp_path)
        return
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    x = 9 * torch.randn(40, 6) + 4
    shift = x.double().mean(-1, keepdim=True) if norm == "lm_layer_norm" else 0.0
    eps = 1e-5 if norm == "lm_layer_norm" else 1e-6
    z = (x - shift) / ((x.double() - shift).square().sum(-1, keepdim=True) / 6 + eps).sqrt()
    latents, recon = sae_lens_rule(tmp_path, z)
    torch.testing.assert_close(loaded.encode(x).double(), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, rtol=1e-5, atol=1e-5)
    assert (loaded.reads, loaded.writes, loaded.input_norm) == (("resid_mid.3",), ("mlp_out.3",), norm)


def test_latents_rescaled_by_a_decoder_norm_of_zero(tmp_path: Path) -> None:
    foreign(tmp_path)
    rows = load_file(tmp_path / "sae_weights.safetensors")["W_dec"]
    rows[3] = 0.0
    change_weights(tmp_path, W_dec=rows)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    assert not loaded.encode(torch.randn(50, 6))[:, 3].any()


def test_centred_activations_of_sae_lens(tmp_path: Path) -> None:
    foreign(tmp_path)
    kwargs = {"center_writing_weights": True}
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    change_cfg(tmp_path, metadata=cfg["metadata"] | {"model_from_pretrained_kwargs": kwargs})
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    x = torch.randn(40, 6) + 3
    mean = x.double().mean(-1, keepdim=True)
    latents, recon = sae_lens_rule(tmp_path, x - mean)
    torch.testing.assert_close(loaded.encode(x).double(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(x).recon.double(), recon + mean, rtol=1e-4, atol=1e-4)
    assert loaded.metadata["centred"] is True


def change_cfg(folder: Path, **changes: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Any, str]] = {
    "truncated": (lambda f: (f / "sae_weights.safetensors").write_bytes(b"\x08" * 40), "not a whole safetensors"),
    "not json": (lambda f: (f / "cfg.json").write_text("{"), "cfg.json is not valid JSON: Expecting"),
    "empty": (lambda f: (f / "cfg.json").write_text(""), "not valid JSON"),
    "not text": (lambda f: (f / "cfg.json").write_bytes(b"\xff\xfe"), "not valid JSON: 'utf-8' codec"),
    "too deep": (lambda f: (f / "cfg.json").write_text("[" * 200_000), "nested too deeply"),
    "weights a folder": (lambda f: as_folder(f / "sae_weights.safetensors"), "it is none.*Looked for: .*native"),
    "a list": (lambda f: (f / "cfg.json").write_text("[]"), "must hold a JSON object, found list"),
    "wrong shape": (
        lambda f: change_weights(f, b_enc=torch.zeros(3)),
        r"b_enc must have shape \[16\], found \[3\]",
    ),
    "extra key": (lambda f: change_weights(f, evil=torch.zeros(1)), r"unexpected \['evil'\]"),
    "missing key": (lambda f: change_weights(f, b_dec=None), r"missing \['b_dec'\]"),
    "nan": (
        lambda f: change_weights(f, b_dec=torch.full((6,), float("nan"))),
        "b_dec has values that are not finite",
    ),
    "architecture": (lambda f: change_cfg(f, architecture="moe"), "architecture must be one of .*got 'moe'"),
    "normalised": (
        lambda f: change_cfg(f, normalize_activations="expected_average_only_in"),
        "must be one of none, layer_norm, .*got 'expected_average_only_in'",
    ),
    "a layer-normed transcoder": (
        lambda f: change_cfg(
            f, normalize_activations="layer_norm", architecture="transcoder", d_out=6, apply_b_dec_to_input=False
        ),
        "needs an autoencoder of one site",
    ),
    "a transcoder with a bias on its input": (
        lambda f: change_cfg(f, architecture="transcoder", d_out=6),
        "apply_b_dec_to_input must be false in a transcoder, got true",
    ),
    "latents that depend on other tokens": (
        lambda f: change_cfg(f, architecture="temporal"),
        "architecture=temporal is not supported because",
    ),
    "no encoder": (
        lambda f: change_cfg(f, architecture="matching_pursuit"),
        "architecture=matching_pursuit is not supported because",
    ),
    "a checkpoint": (
        lambda f: change_cfg(f, architecture="matryoshka_batchtopk"),
        "is not supported because it is a training checkpoint",
    ),
    "half a gate": (
        lambda f: change_cfg(f, architecture="gated"),
        r"missing \['b_gate', 'b_mag', 'r_mag'\], unexpected \['b_enc'\]",
    ),
    "too large": (
        lambda f: change_weights(f, b_dec=torch.full((6,), 3e38)),
        "too large: b_enc would not be finite",
    ),
    "no width": (lambda f: change_cfg(f, d_in=None), "the widths are None and 16"),
    "huge": (lambda f: change_cfg(f, d_sae=10**12), "W_enc is .*but the widths are 6 and 1000000000000"),
    "metadata": (lambda f: change_cfg(f, metadata="x"), "missing or wrong field"),
    "no metadata": (lambda f: change_cfg(f, metadata=None), "missing or wrong field"),
    "k a fraction": (lambda f: change_cfg(f, k=4.5), "whole number|Type-check"),
    "k too large": (lambda f: change_cfg(f, k=17), "at most n_latents"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    foreign(tmp_path)
    act, message = DAMAGE[damage]
    act(tmp_path)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path)


def test_a_folder_instead_of_the_configuration(tmp_path: Path) -> None:
    foreign(tmp_path)
    as_folder(tmp_path / "cfg.json")
    with pytest.raises(DictlearnError, match="holds no dictionary"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("kind", ["base", "../../types", "os"])
def test_a_file_cannot_name_code(tmp_path: Path, kind: str) -> None:
    save(CASES["topk"](), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"]["dictlearn"]["kind"] = kind
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(FormatError, match="has no kind"):
        dictlearn.load(tmp_path)


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    save(CASES["topk"](), tmp_path)
    change_cfg(tmp_path, k=9)  # as another tool would edit it
    with pytest.raises(FormatError, match=r"contradict metadata.dictlearn.*'k': \(9, 4\)"):
        dictlearn.load(tmp_path)


def test_a_layer_norm_taken_away_is_noticed(tmp_path: Path) -> None:
    save(CASES["topk, layer_norm"](), tmp_path)
    change_cfg(tmp_path, normalize_activations="none")
    with pytest.raises(FormatError, match=r"contradict metadata.dictlearn.*\('none', 'layer_norm'\)"):
        dictlearn.load(tmp_path)


def test_only_inference_dictionaries_are_written(tmp_path: Path) -> None:
    tiny = Linear.tiny()
    tiny.read_scale.fill_(2.0)
    with pytest.raises(DictlearnError, match="for_inference"):
        save(tiny, tmp_path)

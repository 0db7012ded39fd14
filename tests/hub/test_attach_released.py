"""Released dictionaries on the model they were made for, whose hooks of Hugging Face alone say what they read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM, load_lm
from dictlearn.splice import Run
from tests.tiny_lms import tiny_lm_folder

IDS = torch.arange(12).reshape(2, 6) % 7 + 2
IDS[:, 0] = 0  # BOS
N = 24


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("gpt2"), "gpt2")))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("gemma"), "gemma2")))


def weights(d_in: int, d_out: int, **names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (d_in, N), "b_enc": (N,), "W_dec": (N, d_out), "b_dec": (d_out,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {names.get(name, name): value for name, value in found.items()}


def seen(model: nn.Module, module: str, inputs: bool = False) -> Tensor:
    """What a module of the bare model gives (or takes)."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        value = args[0] if inputs else out if isinstance(out, Tensor) else out[0]
        found.append(value.detach())

    with model.get_submodule(module).register_forward_hook(keep), torch.no_grad():
        model(IDS)
    return found[0]


def attached(lm: LM, folder: Path) -> tuple[Dictionary, Run]:
    """A dictionary as its files are loaded, in a model whose logits it does not change."""
    dictionary = dictlearn.load(folder)
    assert isinstance(dictionary, Dictionary)
    bare = lm.model(IDS).logits
    with dictlearn.attach(lm, dictionary) as run:
        assert torch.equal(run(IDS).logits, bare)
    return dictionary, run


def relu_rule(x: Tensor, w: dict[str, Tensor], bias_on_input: bool = False) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction in float64."""
    x, w = x.double(), {name: value.double() for name, value in w.items()}
    latents = ((x - w["b_dec"] if bias_on_input else x) @ w["W_enc"] + w["b_enc"]).relu()
    return latents, latents @ w["W_dec"] + w["b_dec"]


def check(run: Run, latents: Tensor, recon: Tensor, activation: Tensor) -> None:
    (name,) = run.latents
    torch.testing.assert_close(run.latents[name].double(), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run.recon[name].double(), recon, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(run.recon[name] + run.errors[name], activation, rtol=1e-5, atol=1e-5)


def legacy(folder: Path, w: dict[str, Tensor], hook: str, **cfg: object) -> Path:
    """A folder that SAELens wrote before version 6."""
    folder.mkdir(parents=True)
    save_file(w, folder / "sae_weights.safetensors")
    known = {"architecture": "standard", "hook_name": hook, "d_in": w["W_enc"].shape[0], "d_sae": N}
    shared = {"model_name": "gpt2-small", "dtype": "float32", "prepend_bos": True, "context_size": 128}
    (folder / "cfg.json").write_text(json.dumps(known | shared | cfg))
    return folder


def centre_writing_weights(model: nn.Module) -> nn.Module:
    """As TransformerLens does: the mean over the width is taken off all that is added to the residual stream."""
    centred = copy.deepcopy(model)
    unembedding = centred.get_submodule("lm_head")
    unembedding.weight = nn.Parameter(unembedding.get_parameter("weight").clone())  # no longer that of wte
    with torch.no_grad():
        for name, parameter in centred.named_parameters():
            writes = ("wte.weight", "wpe.weight", "attn.c_proj.weight", "mlp.c_proj.weight", "c_proj.bias")
            if name.endswith(writes):
                parameter.sub_(parameter.mean(-1, keepdim=True))
    return centred


@pytest.mark.parametrize(
    ("hook", "module"),
    [
        ("blocks.1.hook_resid_pre", "transformer.h.0"),
        ("blocks.1.hook_mlp_out", "transformer.h.1.mlp"),
    ],
)
def test_centred_residuals(gpt2: LM, tmp_path: Path, hook: str, module: str) -> None:
    """It sees in the plain model what it was made for in the centred one; its output keeps the token's mean."""
    d = gpt2.d_model
    w = weights(d, d)
    folder = tmp_path / "jbloom/GPT2-Small-SAEs-Reformatted/x"
    kwargs = {"center_writing_weights": True}
    dictionary, run = attached(gpt2, legacy(folder, w, hook, model_from_pretrained_kwargs=kwargs))
    assert dictionary.input_norm == "centre"
    assert dictionary.metadata["centred"] is True
    centred = centre_writing_weights(gpt2.model)
    torch.testing.assert_close(  # the centred model is the same one up to a shift of the logits
        centred(IDS).logits.softmax(-1), gpt2.model(IDS).logits.softmax(-1), rtol=1e-4, atol=1e-5
    )
    x, plain = seen(centred, module), seen(gpt2.model, module)
    latents, recon = relu_rule(x, w, bias_on_input=True)
    check(run, latents, recon + plain.mean(-1, keepdim=True), plain)


def test_a_layer_norm_of_each_token(gpt2: LM, tmp_path: Path) -> None:
    w = weights(gpt2.d_model, gpt2.d_model)
    cfg = {"normalize_activations": "layer_norm", "apply_b_dec_to_input": True}
    _, run = attached(gpt2, legacy(tmp_path / "x", w, "blocks.2.hook_resid_post", **cfg))
    x = seen(gpt2.model, "transformer.h.2").double()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    latents, recon = relu_rule((x - mean) / (std + 1e-5), w, bias_on_input=True)
    check(run, latents, recon * std + mean, x.float())


def test_the_heads_values_side_by_side(gpt2: LM, tmp_path: Path) -> None:
    """Of Kissane et al.: the input of attention's output projection."""
    x = seen(gpt2.model, "transformer.h.1.attn.c_proj", inputs=True)
    w = weights(x.shape[-1], x.shape[-1])
    torch.save(w, tmp_path / "a.pt")
    (tmp_path / "a_cfg.json").write_text(json.dumps({"act_name": "blocks.1.attn.hook_z"}))
    _, run = attached(gpt2, tmp_path / "a.pt")
    check(run, *relu_rule(x, w, bias_on_input=True), x)


def test_the_normalised_residual_without_the_gain(gemma: LM, tmp_path: Path) -> None:
    """`ln2.hook_normalized` of a Gemma Scope transcoder: the norm before the MLP, its gain taken out again."""
    norm = "model.layers.1.pre_feedforward_layernorm"
    w = weights(gemma.d_model, gemma.d_model) | {"threshold": torch.full((N,), 0.5)}
    folder = tmp_path / "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_10"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", allow_pickle=False, **{name: value.numpy() for name, value in w.items()})
    dictionary, run = attached(gemma, folder)
    assert (dictionary.reads, dictionary.writes) == (("resid_mid.1",), ("mlp_out.1",))
    gain = 1 + gemma.model.get_parameter(f"{norm}.weight").detach().double()
    x = seen(gemma.model, norm).double() / gain
    pre = x @ w["W_enc"].double() + w["b_enc"].double()
    latents = pre * (pre > 0.5)
    recon = latents @ w["W_dec"].double() + w["b_dec"].double()
    check(run, latents, recon, seen(gemma.model, "model.layers.1.post_feedforward_layernorm"))


def test_raw_embeddings(gemma: LM, tmp_path: Path) -> None:
    """Of Gemma Scope: the rows of the embedding, that the model multiplies by sqrt(d)."""
    d = gemma.d_model
    w = weights(d, d) | {"threshold": torch.full((N,), 0.1)}
    folder = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", allow_pickle=False, **{name: value.numpy() for name, value in w.items()})
    _, run = attached(gemma, folder)
    raw = gemma.model.get_parameter("model.embed_tokens.weight").detach()[IDS].double()
    pre = raw @ w["W_enc"].double() + w["b_enc"].double()
    latents = pre * (pre > 0.1)
    recon = latents @ w["W_dec"].double() + w["b_dec"].double()
    check(run, latents, recon * d**0.5, seen(gemma.model, "model.layers.0", inputs=True))


def test_special_positions_are_left_out(gpt2: LM, tmp_path: Path) -> None:
    """A dictionary that was made without BOS is put in elsewhere: there alone gradients go through its latents."""
    w = weights(gpt2.d_model, gpt2.d_model)
    dictionary = dictlearn.load(legacy(tmp_path / "x", w, "blocks.1.hook_resid_post"))
    with dictlearn.attach(gpt2, dictionary, policy="stop", positions=IDS != 0) as run:
        run(IDS).logits.square().sum().backward()
    (latents,) = run.latents.values()
    assert latents.grad is not None
    assert not latents.grad[:, 0].any()
    assert latents.grad[:, 1:].any(dim=-1).all()

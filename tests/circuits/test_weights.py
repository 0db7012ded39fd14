"""Weight-based attributions against autograd of the frozen model, plain loops and the model's own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dictlearn.circuits.attention_latents import direct_feature_attribution
from dictlearn.circuits.decomposition import decompose
from dictlearn.circuits.dictionary_maps import decoder_rows
from dictlearn.circuits.freeze import Frozen, held, recorded
from dictlearn.circuits.parts import STREAM, layer_at
from dictlearn.circuits.weights import (
    de_embedding,
    encoder_directions,
    linear_maps,
    logit_effects,
    through_heads,
    virtual_weights,
)
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture, edit
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, Site
from tests.circuits.setup import cross_layer, filled, tiny_model

GetModel = Callable[[str], PreTrainedModel]
FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "gpt_neox_sequential", "qwen3", "olmo2", "opt", "phi", "phi3")
IDS = torch.randint(2, 97, (1, 6), generator=torch.Generator().manual_seed(0))
N_LATENTS, D = 20, 16


def transcoder(layer: int, seed: int, read: str = "mlp_in", **arguments) -> Dictionary:
    made = Linear(D, D, N_LATENTS, TopK(k=4), [f"{read}.{layer}"], [f"mlp_out.{layer}"], **arguments)
    found = filled(made, seed)
    found.read_scale.fill_(1.5)
    found.write_scale.fill_(0.7)
    return found


def record(model: PreTrainedModel, names: list[str]) -> tuple[Frozen, dict[str, Tensor]]:
    sites = [resolve(model, name) for name in names]
    with torch.no_grad(), recorded(model) as frozen, capture(model, sites) as acts:
        model(IDS)
    return frozen, dict(acts)


def inverse(frozen: Frozen, norm: nn.Module | None) -> Tensor:
    """One over the denominator at each position, [ctx, 1]; the decoder of OPT has no axis for rows."""
    assert norm is not None
    return frozen.scales[norm].view(-1, 1)


def gradient(model: PreTrainedModel, frozen: Frozen, start: str, end: str, along: Tensor, at: int) -> Tensor:
    """Of along . end[at] to the activations at `start`, [ctx, d], patterns and denominators held, MLPs and other
    layers' attentions cut off.
    """
    leaf: list[Tensor] = []

    def begin(act: Tensor) -> Tensor:
        leaf.append(act.detach().requires_grad_())
        return leaf[0]

    layers = range(model.config.num_hidden_layers)
    cut = [f"mlp_out.{layer}" for layer in layers]
    cut += [f"attn_out.{layer}" for layer in layers if f"resid_pre.{layer}" != start]
    edits: dict[Site, Callable[[Tensor], Tensor]] = {
        resolve(model, name): torch.Tensor.detach for name in cut if name not in (start, end)
    }
    edits[resolve(model, start)] = begin
    with held(model, frozen), edit(model, edits), capture(model, [resolve(model, end)]) as acts:
        model(IDS)
    (found,) = torch.autograd.grad(acts[end][0, at] @ along, leaf[0])
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_weights_are_gradients_times_the_denominator(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path, family)
    maps, source, target = linear_maps(model), transcoder(0, 1), transcoder(2, 2)
    frozen, _ = record(model, [])
    found = virtual_weights(maps, source, target)
    norm = maps.mlp_norms[2].module
    for j in (0, 7):
        along = target.W_enc[:, j] * 1.5
        slow = source.W_dec / 0.7 @ gradient(model, frozen, "mlp_out.0", "mlp_in.2", along, 4)[4]
        if norm is not None:
            slow = slow / inverse(frozen, norm)[4]
        torch.testing.assert_close(found[:, j], slow, atol=1e-10, rtol=1e-10)
    some = virtual_weights(maps, source, target, torch.tensor([3, 1]), torch.tensor([7]))
    torch.testing.assert_close(some, found[[3, 1]][:, [7]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_pulled_back_through_heads(tmp_path: Path, family: str) -> None:
    """All heads together are the gradient through attention; each one alone is checked in test_each_head."""
    model = tiny_model(tmp_path, family)
    maps = linear_maps(model)
    frozen, _ = record(model, [])
    along = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    at, own = 4, maps.attentions[1]
    slow = gradient(model, frozen, "resid_pre.1", "attn_out.1", along, at)
    pattern = next(p for m, p in frozen.patterns.items() if m.layer_idx == 1)[0, :, at]  # [n_heads, ctx]
    found = torch.einsum("hs,hd->sd", pattern, through_heads(maps, 1, along[None])[0])
    if own.norm.module is not None:
        found = found * inverse(frozen, own.norm.module)
    if own.post.module is not None:
        found = found * inverse(frozen, own.post.module)[at]
    torch.testing.assert_close(found, slow, atol=1e-10, rtol=1e-9)


def test_each_head(model: GetModel) -> None:
    """Against the projections' own weights, with one group of values for both heads in Llama."""
    gpt2, llama = model("gpt2"), model("llama")
    attn: Any = gpt2.get_submodule("transformer.h.1.attn")
    own = linear_maps(gpt2).attentions[1]
    for head in range(2):
        columns = slice(2 * D + 8 * head, 2 * D + 8 * head + 8)
        torch.testing.assert_close(own.W_V[head], attn.c_attn.weight[:, columns], atol=1e-12, rtol=0)
        torch.testing.assert_close(own.b_V[head], attn.c_attn.bias[columns], atol=1e-12, rtol=0)
        torch.testing.assert_close(own.W_O[head], attn.c_proj.weight[8 * head : 8 * head + 8], atol=0, rtol=0)
    attn, own = llama.get_submodule("model.layers.1.self_attn"), linear_maps(llama).attentions[1]
    for head in range(2):
        torch.testing.assert_close(own.W_V[head], attn.v_proj.weight.T, atol=1e-12, rtol=0)
        torch.testing.assert_close(own.W_O[head], attn.o_proj.weight.T[8 * head : 8 * head + 8], atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_de_embedding_is_what_a_token_more_adds(tmp_path: Path, family: str) -> None:
    """Against the difference of two tokens' pre-activations of layer 0 without attention, the denominator held."""
    model = tiny_model(tmp_path, family)
    maps, target = linear_maps(model), transcoder(0, 4)
    table = de_embedding(maps, encoder_directions(maps, target))
    assert table.shape == (N_LATENTS, 97)
    embedded = model.get_input_embeddings()(torch.arange(97)).detach()  # without positions
    torch.testing.assert_close(table, encoder_directions(maps, target) @ embedded.T, atol=1e-10, rtol=1e-9)
    frozen, _ = record(model, [])
    site, at = resolve(model, "mlp_in.0"), 3
    other = IDS.clone()
    other[0, at] = 50
    reads = []
    for ids in (IDS, other):
        edits = {resolve(model, "attn_out.0"): torch.zeros_like}
        with torch.no_grad(), held(model, frozen), edit(model, edits), capture(model, [site]) as acts:
            model(ids)
        reads.append(target.pre_activations(acts[site.name][0, at]))
    norm = maps.mlp_norms[0].module
    expected = (table[:, 50] - table[:, IDS[0, at]]) * (1.0 if norm is None else inverse(frozen, norm)[at])
    torch.testing.assert_close(reads[1] - reads[0], expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi"])
def test_logit_effects_are_changes_of_the_logits(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path, family)
    maps, source = linear_maps(model), transcoder(2, 5)
    rows = decoder_rows(source)
    frozen, _ = record(model, [])
    logits = []
    for added in (0.0, rows[6]):
        edits = {resolve(model, "mlp_out.2"): lambda act, added=added: act + added}
        with torch.no_grad(), held(model, frozen), edit(model, edits):
            logits.append(model(IDS).logits[0, 2])
    change = logits[1] - logits[0]
    found = logit_effects(maps, rows)
    expected = found[6] * inverse(frozen, maps.final_norm.module)[2]
    torch.testing.assert_close(change - change.mean(), expected, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(found.mean(-1), torch.zeros(N_LATENTS).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_a_bfloat16_model_are_those_of_its_weights(tmp_path: Path, family: str) -> None:
    """Against the same weights in float64: nothing on the way is rounded to bfloat16."""
    model = tiny_model(tmp_path, family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and gains as large as weights
                parameter.add_(torch.randn(len(parameter), generator=torch.Generator().manual_seed(0)), alpha=0.3)
    model.bfloat16()
    rough, exact = linear_maps(model), linear_maps(copy.deepcopy(model).double())
    for found, expected in zip(rough.attentions, exact.attentions, strict=True):
        for name in ("W_V", "b_V", "W_O", "b_O"):
            assert getattr(found, name).dtype == torch.float32
            assert torch.equal(getattr(found, name).double(), getattr(expected, name)), name
    along = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for part in (de_embedding, logit_effects, lambda maps, d: through_heads(maps, 1, d)):
        found, expected = part(rough, along.float()), part(exact, along)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_layer_of_a_site_by_any_name(model: GetModel) -> None:
    gpt2, neox = model("gpt2"), model("gpt_neox")
    assert layer_at(gpt2, resolve(gpt2, "transformer.h.1.mlp"), ("attn_out", "mlp_out")) == (1, "mlp_out")
    assert layer_at(gpt2, resolve(gpt2, "transformer.h.2.ln_2:in"), STREAM) == (2, "resid_mid")
    assert layer_at(gpt2, resolve(gpt2, "embed"), STREAM) is None
    assert layer_at(neox, resolve(neox, "resid_post.0"), STREAM) == (0, "resid_post")  # which has no resid_mid


def test_maps_leave_the_model_as_it_was(model: GetModel) -> None:
    own = model("gemma2")
    with torch.no_grad():
        before = own(IDS).logits
        maps = linear_maps(own)
        assert torch.equal(own(IDS).logits, before)
    assert len({id(norm.module) for norm in maps.mlp_norms}) == 3


def test_weights_that_are_refused(model: GetModel) -> None:
    own = model("gpt2")
    maps = linear_maps(own)
    with pytest.raises(DictlearnError, match=r"mlp_out.1 is not in what mlp_in.1 sees"):
        virtual_weights(maps, transcoder(1, 0), transcoder(1, 1))
    bilinear = filled(Bilinear(D, D, N_LATENTS, TopK(k=4), ["mlp_in.1"], ["mlp_out.1"]))
    with pytest.raises(DictlearnError, match=r"quadratic: see dictlearn\.circuits\.bilinear"):
        encoder_directions(maps, bilinear)
    with pytest.raises(DictlearnError, match=r"need a site mlp_in, .* got 'attn_in.1'"):
        encoder_directions(maps, transcoder(1, 0, read="attn_in"))
    sae = Linear(D, D, N_LATENTS, ReLU(l1=0.0), ["resid_mid.1"], ["resid_mid.1"], input_norm="layer_norm")
    with pytest.raises(DictlearnError, match=r"an input_norm that is not undone .* got .layer_norm"):
        encoder_directions(maps, filled(sae))
    with pytest.raises(DictlearnError, match="One prompt at a time"):
        decompose(maps, {}, IDS.repeat(2, 1))


def test_cross_layer_transcoders_are_refused(model: GetModel) -> None:
    own = model("gpt2")
    maps, named = linear_maps(own), cross_layer(own)
    (clt,) = named.values()
    for refused in (
        lambda: decompose(maps, named, IDS),
        lambda: virtual_weights(maps, clt, transcoder(2, 0)),
        lambda: virtual_weights(maps, transcoder(0, 0), clt),
        lambda: encoder_directions(maps, clt),
        lambda: direct_feature_attribution(maps, clt, IDS, [0]),
    ):
        with pytest.raises(DictlearnError, match=r"cross-layer transcoders .*attribution graphs: see"):
            refused()

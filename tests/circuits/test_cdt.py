"""Contextual decomposition: its rules by hand, linear models, parts that add up."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import LinearActivation

from dictlearn.circuits.cdt import decomposed, relevant_logits
from dictlearn.circuits.parts import parts_of
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture, edit
from dictlearn.types import DictlearnError, Site
from tests.circuits.edits import unbiased, with_modules
from tests.tiny_lms import CONFIGS

GetModel = Callable[[str], PreTrainedModel]
FAMILIES = [family for family in CONFIGS if family != "gptj"]
IDS = torch.randint(2, 97, (3, 7), generator=torch.Generator().manual_seed(3))


def noise(d: int = 16, n: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(n, 7, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows_at(model: PreTrainedModel, *paths: str) -> list[Tensor]:
    """x and gamma `[3 + 3, ctx, d]` at module paths, beta being put in before layer 1."""
    sites = [Site(path, path.removesuffix(":in"), "in" if path.endswith(":in") else "out") for path in paths]
    beta = torch.cat([torch.zeros(3, 7, 16), noise()])
    first = {resolve(model, "resid_pre.1"): lambda act: act - beta}
    with torch.no_grad(), decomposed(model), edit(model, first), capture(model, sites) as acts:
        model(IDS.repeat(2, 1))
    return [acts[path] for path in paths]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_x_are_the_model(model: GetModel, family: str) -> None:
    """Whatever is taken out of gamma; and where nothing is, nothing is found."""
    own = model(family)
    site = resolve(own, "resid_pre.1")
    with torch.no_grad():
        plain = own(IDS).logits
        with decomposed(own), edit(own, {site: lambda act: act - torch.cat([0 * noise(), noise()])}):
            rows = own(IDS.repeat(2, 1)).logits
    torch.testing.assert_close(rows[:3], plain, rtol=0, atol=1e-6 * float(plain.abs().max()))
    assert (rows[3:] - plain).abs().max() > 0.1
    assert relevant_logits(own, IDS, {site: torch.zeros_like}).abs().max() < 1e-13


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_the_stream_is_all_of_the_logits(model: GetModel, family: str) -> None:
    """Without biases: beta = x leaves nothing to gamma, through every rule."""
    own = unbiased(model(family))
    with torch.no_grad():
        plain = own(IDS).logits
    found = relevant_logits(own, IDS, {resolve(own, "resid_pre.0"): lambda x: x})
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6 * float(plain.abs().max()))


def linear_model(model: PreTrainedModel) -> PreTrainedModel:
    """Without norms and curved activations, with patterns that are the same for all inputs."""
    own = with_modules(model, nn.LayerNorm, nn.Identity)
    own = with_modules(own, type(parts_of(own).activations[0]), LinearActivation)
    with torch.no_grad():
        for layer in range(3):
            own.get_parameter(f"transformer.h.{layer}.attn.c_attn.weight")[:, :32] = 0
    return own


@pytest.mark.parametrize("kinds", [["resid_pre.1"], ["resid_mid.1"], ["attn_out.0", "mlp_out.1"], ["attn_z.2"]])
def test_in_a_linear_model_it_is_what_ablation_changes(model: GetModel, kinds: list[str]) -> None:
    own = linear_model(model("gpt2"))
    sites = [resolve(own, kind) for kind in kinds]
    with torch.no_grad():
        plain = own(IDS).logits
        with edit(own, {site: lambda act: act - noise() for site in sites}):
            ablated = own(IDS).logits
    found = relevant_logits(own, IDS, dict.fromkeys(sites, noise()))
    assert found.abs().max() > 1e-2
    torch.testing.assert_close(found, plain - ablated, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_activation(model: GetModel, sigmoid: bool) -> None:
    """Also of one that is not 0 at 0: that is no part of beta."""
    own = model("gpt2")
    own = with_modules(own, type(parts_of(own).activations[0]), nn.Sigmoid) if sigmoid else own
    before, after = rows_at(own, "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj:in")
    act = parts_of(own).activations[1]
    x, gamma = before.chunk(2)
    expected = (act(x) - act(gamma)) / 2 + (act(x - gamma) - act(torch.zeros(()))) / 2
    torch.testing.assert_close(after[:3] - after[3:], expected)
    torch.testing.assert_close(after[:3], act(x))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_gated_product(model: GetModel, family: str) -> None:
    """The product of the betas and half of each cross term."""
    own = model(family)
    names = ["gate_up_proj"] if family == "phi3" else ["gate_proj", "up_proj"]
    act = "activation_fn" if family == "phi3" else "act_fn"
    *factors, a, product = rows_at(own, *[f"model.layers.1.mlp.{name}" for name in (*names, act, "down_proj:in")])
    u = factors[0].chunk(2, -1)[1] if family == "phi3" else factors[1]
    (a_x, a_gamma), (u_x, u_gamma) = a.chunk(2), u.chunk(2)
    a_beta, u_beta = a_x - a_gamma, u_x - u_gamma
    expected = a_beta * u_beta + a_beta * u_gamma / 2 + a_gamma * u_beta / 2
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(product[:3] - product[3:], expected)
    torch.testing.assert_close(product[:3], a_x * u_x)


def test_norms(model: GetModel) -> None:
    """Both parts have the denominator of x; the layer norm's bias stays with gamma."""
    before, after = rows_at(model("llama"), "model.layers.1.post_attention_layernorm:in", "model.layers.1.mlp:in")
    x, gamma = before.chunk(2)
    weight = model("llama").get_parameter("model.layers.1.post_attention_layernorm.weight")
    sigma = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(after, torch.cat([x, gamma]) / sigma.repeat(2, 1, 1) * weight)
    before, after = rows_at(model("gpt2"), "transformer.h.1.ln_2:in", "transformer.h.1.ln_2")
    norm = model("gpt2").get_submodule("transformer.h.1.ln_2")
    x, gamma = before.chunk(2)
    weight, bias = norm.get_parameter("weight"), norm.get_parameter("bias")
    scale = weight / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(after[3:], (gamma - gamma.mean(-1, keepdim=True)) * scale + bias)


def test_attention_has_the_pattern_of_x(model: GetModel) -> None:
    own = copy.deepcopy(model("gpt2"))
    qkv, z = rows_at(own, "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj:in")
    own.set_attn_implementation("eager")
    with torch.no_grad():
        pattern = own(IDS, output_attentions=True).attentions[1]
    value = qkv[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(z, (pattern.repeat(2, 1, 1, 1) @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_several_parts_at_once(model: GetModel, family: str) -> None:
    own, sites = model(family), [resolve(model(family), kind) for kind in ("resid_mid.0", "mlp_out.1")]
    betas = [{site: noise(seed=10 * part + i) for i, site in enumerate(sites)} for part in range(3)]
    single = torch.cat([relevant_logits(own, IDS, beta, logits_to_keep=2) for beta in betas])
    together = {site: torch.cat([beta[site] for beta in betas]) for site in sites}
    assert single.shape == (9, 2, 97)
    torch.testing.assert_close(relevant_logits(own, IDS, together, n_parts=3, logits_to_keep=2), single)


def test_a_shape_that_is_not_betas(model: GetModel) -> None:
    own = model("gpt2")
    with pytest.raises(DictlearnError, match=r"'resid_pre\.0' must be .* \[6, 7, 16\], got \[3, 7, 16\]"):
        relevant_logits(own, IDS, {resolve(own, "resid_pre.0"): noise()}, n_parts=2)

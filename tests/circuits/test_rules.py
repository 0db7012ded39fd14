"""Backward rules: closed forms of each, conservation with all of them, and models left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dictlearn.circuits.cdt import decomposed
from dictlearn.circuits.parts import parts_of
from dictlearn.circuits.rules import frozen, relevance
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture, edit
from dictlearn.types import DictlearnError, Site
from tests.circuits.edits import unbiased, with_modules
from tests.tiny_lms import CONFIGS

GetModel = Callable[[str], PreTrainedModel]
FAMILIES = [family for family in CONFIGS if family != "gptj"]
IDS = torch.randint(2, 97, (3, 7), generator=torch.Generator().manual_seed(3))  # longer than a window of 4
DIRECTION = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
CONTEXTS = {
    "relevance": relevance,
    "attention": lambda model: relevance(model, attention=True),
    "frozen": frozen,
}


def module_site(path: str, io: str = "out") -> Site:
    assert io in ("in", "out")
    return Site(f"{path}:{io}", path, "in" if io == "in" else "out")


def coefficients(
    model: PreTrainedModel, sites: Sequence[Site], context=None
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The metric of each row, and activations and gradients at sites; the metric is linear in the last logits."""
    leaf = {resolve(model, "embed"): lambda act: act.detach().requires_grad_()}
    with context or nullcontext(), edit(model, leaf), capture(model, sites) as acts:
        metric = model(IDS).logits[:, -1] @ DIRECTION
        found = [acts[site.name] for site in sites]
        grads = torch.autograd.grad(metric.sum(), found, allow_unused=True)
    return metric.detach(), [act.detach() for act in found], list(grads)


def cuts(model: PreTrainedModel) -> list[Site]:
    """Every residual cut that the architecture has, and the embedding.

    Not resid_mid of OPT, which reads `[rows * ctx, d]`: what capture gives there is no part of the graph.
    """
    config = model.config.get_text_config()
    sites = [resolve(model, "embed")]
    for kind in ("resid_pre", "resid_mid", "resid_post")[:: 2 if config.model_type == "opt" else 1]:
        for layer in range(config.num_hidden_layers):
            try:
                sites.append(resolve(model, f"{kind}.{layer}"))
            except DictlearnError:
                assert kind == "resid_mid"
    return sites


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_is_the_models(model: GetModel, family: str, context: str) -> None:
    """Also with grouped queries, sliding windows and softcaps. Norms and softmax of transformers are float32, ours
    float64 in a float64 model."""
    own = model(family)
    with torch.no_grad():
        plain = own(IDS).logits
        with CONTEXTS[context](own):
            inside = own(IDS).logits
    exact = family.startswith(("gpt", "opt")) or family == "phi"
    assert not torch.equal(plain, inside)
    torch.testing.assert_close(inside, plain, rtol=0, atol=(1e-13 if exact else 1e-6) * float(plain.abs().max()))


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_forward_in_float32(model: GetModel, context: str) -> None:
    own = copy.deepcopy(model("llama")).float()
    with torch.no_grad():
        plain = own(IDS).logits
        with CONTEXTS[context](own):
            torch.testing.assert_close(own(IDS).logits, plain, rtol=0, atol=2e-6 * float(plain.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_is_conserved(model: GetModel, family: str) -> None:
    """With all rules and without biases, activations times coefficients are the metric at every cut."""
    own = unbiased(model(family))
    metric, acts, grads = coefficients(own, cuts(own), relevance(own, attention=True))
    assert metric.abs().min() > 0.1
    for act, grad in zip(acts, grads, strict=True):
        assert grad is not None
        torch.testing.assert_close((act * grad).sum((1, 2)), metric, rtol=1e-10, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_the_attention_rule_or_with_true_gradients_it_is_not(model: GetModel, family: str) -> None:
    own = unbiased(model(family))
    for context in (None, relevance(own), frozen(own)):
        metric, acts, grads = coefficients(own, [resolve(own, "resid_pre.0")], context)
        assert grads[0] is not None
        assert ((acts[0] * grads[0]).sum((1, 2)) / metric - 1).abs().min() > 1e-3


def test_plain_gradients_without_norms_and_gates(model: GetModel) -> None:
    """In a ReLU network with attention, the rules without that for attention change nothing."""
    own = with_modules(model("opt"), nn.LayerNorm, nn.Identity)
    sites = cuts(own)
    _, _, plain = coefficients(own, sites)
    _, _, found = coefficients(own, sites, relevance(own))
    assert all(isinstance(act, nn.ReLU) for act in parts_of(own).activations)
    for a, b in zip(found, plain, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2"])
def test_norm_rule(model: GetModel, family: str, context: str) -> None:
    """The last norm: the unembedded direction times the gain over sigma, centred where the norm centres."""
    own = unbiased(model(family))
    _, (x,), (found,) = coefficients(own, [resolve(own, "resid_post.2")], CONTEXTS[context](own))
    norm = own.base_model.get_submodule("ln_f" if family == "gpt2" else "norm")
    gain = norm.get_parameter("weight") + (1 if family == "gemma2" else 0)
    unembedding = own.get_output_embeddings()
    assert unembedding is not None
    weights = (DIRECTION @ unembedding.get_parameter("weight")) * gain
    centred = x[:, -1] - x[:, -1].mean(-1, keepdim=True) if family == "gpt2" else x[:, -1]
    eps = 1e-5 if family in ("gpt2", "olmo2") else 1e-6
    expected = weights / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    expected = expected - expected.mean(-1, keepdim=True) if family == "gpt2" else expected
    assert found is not None
    torch.testing.assert_close(found[:, -1], expected, rtol=1e-9, atol=1e-12)
    assert not found[:, :-1].any()


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_rules_of_a_gated_product(model: GetModel, family: str) -> None:
    """Each factor gets half of the product's coefficient, and the gate that times act(x) / x; the product all."""
    own = model(family)
    mlp = resolve(own, "mlp_in.1").module
    split = "gate_up_proj" if family == "phi3" else "gate_proj"
    wanted = [module_site(f"{mlp}.{name}") for name in (split, "up_proj", "down_proj") if name in dir_of(own, mlp)]
    wanted.append(module_site(f"{mlp}.down_proj", "in"))
    _, acts, grads = coefficients(own, wanted, relevance(own))
    if family == "phi3":
        (gate, up), (of_gate, of_up) = acts[0].chunk(2, -1), required(grads[0]).chunk(2, -1)
    else:
        gate, up, of_gate, of_up = acts[0], acts[1], required(grads[0]), required(grads[1])
    of_product = required(grads[-1])
    torch.testing.assert_close(of_product, required(grads[-2]) @ own.get_parameter(f"{mlp}.down_proj.weight"))
    ratio = torch.sigmoid(gate) if family != "gemma2" else nn.functional.gelu(gate, approximate="tanh") / gate
    torch.testing.assert_close(of_up, of_product * ratio * gate / 2)
    torch.testing.assert_close(of_gate, of_product * up * ratio / 2)


def dir_of(model: PreTrainedModel, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_children()]


def required(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


@pytest.mark.parametrize(
    ("family", "act", "slope"),
    [
        ("llama", "layers.0.mlp.act_fn", torch.sigmoid),
        ("gpt2", "h.0.mlp.act", lambda x: 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("gpt_neox", "layers.0.mlp.act", lambda x: torch.special.ndtr(x)),
        ("opt", "decoder.layers.0.activation_fn", lambda x: (x > 0).to(x.dtype)),
    ],
)
def test_slopes_of_activations(model: GetModel, family: str, act: str, slope: Callable[[Tensor], Tensor]) -> None:
    """act(x) / x as a formula without a quotient, so that it holds at 0."""
    own = model(family)
    x = torch.tensor([-30.0, -2.0, -1e-9, -0.0, 0.0, 1e-300, 1e-7, 0.3, 5.0], dtype=torch.float64).requires_grad_()
    module = own.base_model.get_submodule(act)
    with torch.no_grad():
        plain = module(x)
    with relevance(own):
        y = module(x)
        (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach(), plain, rtol=1e-15, atol=0)
    torch.testing.assert_close(found, slope(x.detach()), rtol=1e-6, atol=1e-20)
    away = x.detach().abs() > 0
    torch.testing.assert_close(found[away], slope(x.detach())[away], rtol=1e-12, atol=1e-20)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_queries_and_keys(model: GetModel, family: str) -> None:
    """They have coefficients but under the attention rule, where the values' are pattern^T times those of z."""
    own = copy.deepcopy(model(family))
    base, d = own.base_model_prefix, own.config.hidden_size
    names = ["h.1.attn.c_attn"] if family == "gpt2" else [f"layers.1.self_attn.{x}_proj" for x in "qkv"]
    sites = [module_site(f"{base}.{name}") for name in names] + [resolve(own, "attn_z.1")]
    for context, constant in ((relevance(own), False), (relevance(own, attention=True), True), (frozen(own), True)):
        *of_qkv, of_z = coefficients(own, sites, context)[2]
        qkv = required(of_qkv[0]).split(d, -1) if family == "gpt2" else of_qkv
        assert all((grad is None or not grad.any()) == constant for grad in qkv[:2])
    own.set_attn_implementation("eager")
    pattern = own(IDS, output_attentions=True).attentions[1]
    of_heads = required(of_z).unflatten(-1, (2, -1)).transpose(1, 2)  # [n, n_heads, ctx, d_head]
    of_values = pattern.mT @ of_heads
    expected = of_values.transpose(1, 2).flatten(2) if family == "gpt2" else of_values.sum(1)  # one group in llama
    torch.testing.assert_close(required(qkv[2]), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_frozen_keeps_true_slopes(model: GetModel) -> None:
    own = model("llama")
    act = own.base_model.get_submodule("layers.0.mlp.act_fn")
    x = torch.linspace(-3, 3, 8, dtype=torch.float64).requires_grad_()
    with frozen(own):
        (found,) = torch.autograd.grad(act(x).sum(), x)
    with torch.no_grad():
        torch.testing.assert_close(found, torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)))


def state(model: PreTrainedModel) -> list[object]:
    """What contexts may change: instance attributes and hooks of modules, the attention of the configuration."""
    modules = list(model.modules())
    return [
        [sorted(vars(module)) for module in modules],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules],
        [vars(module).get("forward") for module in modules],
        model.config._attn_implementation,
        model.config.get_text_config()._attn_implementation,
    ]


@pytest.mark.parametrize("context", [*CONTEXTS, "decomposed"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3"])
def test_models_are_restored(model: GetModel, family: str, context: str) -> None:
    own, make = model(family), (CONTEXTS | {"decomposed": decomposed})[context]
    before, logits = state(own), own(IDS).logits
    with make(own):
        assert state(own) != before
        own(IDS.repeat(2, 1))
    assert state(own) == before
    with pytest.raises(ValueError, match="inside"), make(own):
        raise ValueError("inside")
    assert state(own) == before
    assert torch.equal(own(IDS).logits, logits)


def test_contexts_nest(model: GetModel) -> None:
    own = unbiased(model("llama"))
    before = state(own)
    with frozen(own):
        outer = state(own)
        with relevance(own, attention=True):
            metric, acts, grads = coefficients(own, [resolve(own, "resid_pre.0")])
        assert state(own) == outer
        own(IDS)
    assert state(own) == before
    torch.testing.assert_close((acts[0] * required(grads[0])).sum((1, 2)), metric, rtol=1e-10, atol=0)


def test_an_outer_attention_comes_back(model: GetModel) -> None:
    own, rows = model("gpt2"), IDS.repeat(2, 1)
    change = torch.cat([torch.zeros(3, 7, 16), torch.ones(3, 7, 16)]).double().cumsum(-1)
    with torch.no_grad(), edit(own, {resolve(own, "resid_pre.0"): lambda act: act + change}), decomposed(own):
        before = own(rows).logits
        with frozen(own):
            assert not torch.equal(own(rows).logits, before)
        assert torch.equal(own(rows).logits, before)


def test_several_groups_of_queries() -> None:
    config = LlamaConfig(
        vocab_size=97,
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    own = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        plain = own(IDS).logits
        with frozen(own):
            torch.testing.assert_close(own(IDS).logits, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_who_reads_a_product_sees_its_whole_coefficient(model: GetModel) -> None:
    """Also where its hooks are older than the rules."""
    own = model("llama")
    site = resolve(own, "mlp_hidden.1")
    inside = required(coefficients(own, [site], relevance(own))[2][0])
    with capture(own, [site]) as acts:
        leaf = {resolve(own, "embed"): lambda act: act.detach().requires_grad_()}
        with edit(own, leaf), relevance(own):
            metric = own(IDS).logits[:, -1] @ DIRECTION
            (found,) = torch.autograd.grad(metric.sum(), acts[site.name])
    torch.testing.assert_close(found, inside)


class Scale(nn.Module):
    """A module that no rule is for."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("context", [*CONTEXTS.values(), decomposed])
def test_what_is_not_known_is_refused_before_it_runs(model: GetModel, context: Callable) -> None:
    with pytest.raises(DictlearnError, match=r"known for gpt2, .*, not for 'gptj'"), context(model("gptj")):
        pytest.fail("ran")
    own = copy.deepcopy(model("gpt2"))
    own.base_model.get_submodule("h.1").ln_2 = Scale()
    with pytest.raises(DictlearnError, match=r"transformer\.h\.1\.ln_2 is a Scale"), context(own):
        pytest.fail("ran")
    training = copy.deepcopy(model("gpt2")).train()
    with pytest.raises(DictlearnError, match=r"model\.eval\(\)"), context(training):
        pytest.fail("ran")


def test_activations_must_be_zero_at_zero(model: GetModel) -> None:
    own = copy.deepcopy(model("gpt2"))
    own.base_model.get_submodule("h.1.mlp").act = nn.Sigmoid()
    with pytest.raises(DictlearnError, match=r"0 at 0, Sigmoid is 0\.5"), relevance(own):
        pytest.fail("ran")

"""Scores of nodes: sums over a site, linear models, integrated gradients, exact patching by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dictlearn.circuits.ablation import Ablation
from dictlearn.circuits.baselines import neurons
from dictlearn.circuits.cdt import relevant_logits
from dictlearn.circuits.cuts import cuts_of
from dictlearn.circuits.flow import information_flow
from dictlearn.circuits.methods.base import Method
from dictlearn.circuits.methods.cdt import CDT
from dictlearn.circuits.methods.exact import Exact
from dictlearn.circuits.methods.gradient import Gradient
from dictlearn.circuits.methods.integrated_gradients import IntegratedGradients
from dictlearn.circuits.methods.relp import RelP
from dictlearn.circuits.nodes import NodeValues, everything
from dictlearn.circuits.pairs import PairBatch
from dictlearn.circuits.rules import relevance
from dictlearn.circuits.run import run_circuit
from dictlearn.circuits.scores import node_scores
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture, edit
from dictlearn.types import DictlearnError
from tests.circuits.setup import (
    FAMILIES,
    rows_of,
    scaled_cross_layer,
    scaled_dictionaries,
    skipping,
    some_pairs,
    tiny_model,
)

GetModel = Callable[[str], PreTrainedModel]


def activations(model: PreTrainedModel, batch: PairBatch, site: str) -> tuple[Tensor, Tensor]:
    found = []
    for ids in (batch.clean, batch.patch):
        with torch.no_grad(), capture(model, [resolve(model, site)]) as acts:
            model(ids)
        found.append(acts[site])
    return found[0], found[1]


def moved_by_nodes(model: PreTrainedModel, batch: PairBatch, d: Dictionary) -> Tensor:
    """x_patch - x_clean at the write site, without what a skip path writes."""
    clean, patch = activations(model, batch, d.writes[0])
    if d.W_skip is None:
        return patch - clean
    before = activations(model, batch, d.reads[0])
    return patch - clean - (before[1] - before[0]) @ d.W_skip.T * d.read_scale / d.write_scale


def plain_gradient(model: PreTrainedModel, batch: PairBatch, site: str, act: Tensor) -> Tensor:
    """Of the metric at `act` in place of a site's activation, the rest of the model on the clean prompts."""
    leaf = act.clone().requires_grad_()
    with torch.enable_grad(), edit(model, {resolve(model, site): lambda _: leaf}):
        logits = model(batch.clean).logits[:, -1]
    rows = torch.arange(len(batch))
    (logits[rows, batch.answers[:, 0]] - logits[rows, batch.wrong[:, 0]]).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["each", "all"])
@pytest.mark.parametrize("path", ["gradient", "left", "midpoint"])
def test_scores_of_a_site_add_up(model: GetModel, family: str, positions: str, path: str) -> None:
    """To gradient . (x_patch - x_clean), at every position, whatever the dictionary is; a skip path is no node."""
    own, batch = model(family), some_pairs()
    points = {"gradient": [0.0], "left": [0.0, 1 / 3, 2 / 3], "midpoint": [0.25, 0.75]}[path]
    method = Gradient() if path == "gradient" else IntegratedGradients(len(points), path)
    dictionaries = scaled_dictionaries(own)
    found = node_scores(own, dictionaries, batch, method=method, positions=positions)
    for name, d in dictionaries.items():
        (site,) = d.writes
        clean, _ = activations(own, batch, site)
        moved = moved_by_nodes(own, batch, d)
        mean = sum(plain_gradient(own, batch, site, clean + a * moved) for a in points) / len(points)
        by_position = (mean * moved).sum(-1).mean(0)  # [ctx]
        expected = by_position if positions == "each" else by_position.sum().view(1)
        total = found[name].latents.sum(-1) + found[name].errors.sum(0)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("site", ["mlp_in.1", "mlp_hidden.1", "mlp_out.1", "resid_mid.1", "resid_pre.1"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
def test_every_site_has_its_gradient(model: GetModel, family: str, site: str) -> None:
    """Where a module works on flattened tokens, or the stream goes on past it, as well."""
    own, batch = model(family), some_pairs()
    if family == "gpt_neox" and site.startswith("resid_mid"):
        pytest.skip("a parallel layer has no resid_mid")
    width = activations(own, batch, site)[0].shape[-1]
    d = neurons(site, torch.zeros(2, width, dtype=torch.float64))
    clean, patch = activations(own, batch, site)
    expected = plain_gradient(own, batch, site, clean) * (patch - clean)
    found = node_scores(own, {"d": d}, batch)["d"]
    assert expected.abs().max() > 0
    torch.testing.assert_close(found.latents, expected.mean(0), rtol=1e-5, atol=1e-9)


def test_scores_of_latents_by_hand(model: GetModel) -> None:
    """Every latent by itself, from dense latents and the decoder's rows."""
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)["stream"]
    clean, patch = activations(own, batch, "resid_post.0")
    along = plain_gradient(own, batch, "resid_post.0", clean) @ rows_of(d).T  # [n, ctx, n_latents]
    moved = d.encode(patch) - d.encode(clean)
    found = node_scores(own, {"d": d}, batch)["d"]
    torch.testing.assert_close(found.latents, (along * moved).mean(0))
    assert (found.latents != 0).sum() > 5


def test_the_factor_of_an_input_norm_is_part_of_the_value(model: GetModel) -> None:
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)["z"]
    clean, patch = activations(own, batch, "attn_z.2")
    along = plain_gradient(own, batch, "attn_z.2", clean) @ rows_of(d).T
    moved = d.encode(patch) * patch.std(-1, keepdim=True) - d.encode(clean) * clean.std(-1, keepdim=True)
    found = node_scores(own, {"d": d}, batch)["d"]
    torch.testing.assert_close(found.latents, (along * moved).mean(0))


CHUNKED = ("gradient", "relp", "integrated_gradients", "exact", "cdt", "magnitude", "information_flow", "random")


@pytest.mark.parametrize("method", CHUNKED)
def test_a_forward_has_so_many_rows(model: GetModel, method: str) -> None:
    """And scores are the same for any number of them."""
    own, batch = model("gpt2"), some_pairs(n=5)
    d, seen = {"d": scaled_dictionaries(own)["stream"]}, set()
    if method in ("exact", "cdt"):  # which count nodes times pairs
        chosen = {"d": NodeValues(torch.zeros(6, 24, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool))}
        chosen["d"].latents[3] = True
        own_method: Any = Exact(chosen, n_rows=2) if method == "exact" else CDT(chosen, n_rows=2)
    else:
        own_method = method
    whole = node_scores(own, d, batch, method=own_method)["d"]
    hook = own.register_forward_pre_hook(lambda _, __, kwargs: seen.add(len(kwargs["input_ids"])), with_kwargs=True)
    parts = node_scores(own, d, batch, method=own_method, n_rows=2)["d"]
    hook.remove()
    assert max(seen) == (4 if method == "cdt" else 2)  # rows of x and of gamma
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
        assert torch.equal(one == 0, other == 0)


@pytest.mark.parametrize("method", [Gradient(), IntegratedGradients(2), Exact()], ids=["gradient", "ig", "exact"])
def test_pairs_are_scored_one_by_one(model: GetModel, method: Method) -> None:
    """The order of pairs and how many there are at once does not matter."""
    own, batch = model("gpt2"), some_pairs()
    cuts = cuts_of(own, {"d": scaled_dictionaries(own)["stream"]})
    whole = method.scores(own, cuts, batch, "each")["d"]
    parts = [method.scores(own, cuts, batch.select(slice(i, i + 1)), "each")["d"] for i in (2, 0, 3, 1)]
    for own_whole, of_parts in zip(whole, map(torch.stack, zip(*parts, strict=True)), strict=True):
        torch.testing.assert_close(own_whole, of_parts.mean(0))


def linear(own: Any) -> None:
    """Make a tiny GPT-2 linear in its activations: no norms, no activation function, attention to all alike."""
    layers = own.transformer.h
    for layer in layers:
        layer.ln_1, layer.ln_2, layer.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        d = layer.attn.embed_dim
        layer.attn.c_attn.weight.data[:, : 2 * d] = 0  # queries and keys
        layer.attn.c_attn.bias.data[: 2 * d] = 0
    own.transformer.ln_f = nn.Identity()


def test_in_a_linear_model_every_method_is_exact(tmp_path: Path) -> None:
    own, batch = tiny_model(tmp_path, "gpt2"), some_pairs()
    linear(own)
    dictionaries = scaled_dictionaries(own)
    exact = node_scores(own, dictionaries, batch, method="exact")
    largest = max(float(nodes.latents.abs().max()) for nodes in exact.values())
    assert largest > 1e-3
    by_inputs = IntegratedGradients(2, path="inputs")
    for method in (Gradient(), IntegratedGradients(2), by_inputs, RelP(), RelP(attention=True), CDT()):
        found = node_scores(own, dictionaries, batch, method=method)
        for name in dictionaries:
            for one, other in zip(found[name], exact[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9 * largest)


@pytest.mark.parametrize("path", ["site", "inputs"])
def test_integrated_gradients_add_up_in_float32(tmp_path: Path, path: str) -> None:
    """Of a linear model in bfloat16 all gradients on the way are one, and so is the sum of their hundredths."""
    own, batch = tiny_model(tmp_path, "gpt2"), some_pairs()
    linear(own)
    own, d = own.bfloat16(), {"d": scaled_dictionaries(own)["stream"].float()}
    one, many = (node_scores(own, d, batch, method=IntegratedGradients(n, "left", path))["d"] for n in (1, 100))
    assert one.latents.dtype == torch.float32
    torch.testing.assert_close(many.latents, one.latents, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_at_a_cut_sum_to_the_effect(model: GetModel, family: str) -> None:
    own, batch = model(family), some_pairs()
    cut = {"d": scaled_dictionaries(own)["stream"]}
    with torch.no_grad():
        clean, patch = (batch.value(own(ids).logits[:, -1]).mean() for ids in (batch.clean, batch.patch))

    def missed(method: Method) -> float:
        found = node_scores(own, cut, batch, method=method)["d"]
        return float((found.latents.sum() + found.errors.sum() - (patch - clean)).abs() / (patch - clean).abs())

    assert missed(Gradient()) > 0.05
    assert missed(IntegratedGradients(5)) < 0.01
    assert missed(IntegratedGradients(5, "midpoint")) < 0.03
    assert missed(IntegratedGradients(20, "midpoint")) < 0.002  # its error falls with the square of the points
    assert missed(IntegratedGradients(10, "left")) > missed(IntegratedGradients(5))


@pytest.mark.parametrize("positions", ["each", "all"])
def test_exact_patching_by_hand(model: GetModel, positions: str) -> None:
    own, batch = model("llama"), some_pairs()
    d = scaled_dictionaries(own)["attention"]
    site = resolve(own, "attn_out.1")
    clean, patch = activations(own, batch, "attn_out.1")
    found = node_scores(own, {"d": d}, batch, method=Exact(n_rows=9), positions=positions)["d"]
    moved = d.encode(patch) - d.encode(clean)
    error = (patch - d(patch).recon) - (clean - d(clean).recon)
    with torch.no_grad():
        base = batch.value(own(batch.clean).logits[:, -1])
        for place, at in ((0, range(6)),) if positions == "all" else ((1, [1]), (3, [3]), (5, [5])):
            for latent in (0, 7, 13):
                added = torch.zeros_like(clean)
                for position in at:
                    added[:, position] = moved[:, position, latent, None] * rows_of(d)[latent]
                with edit(own, {site: lambda act, added=added: act + added}):
                    effect = batch.value(own(batch.clean).logits[:, -1]) - base
                torch.testing.assert_close(found.latents[place, latent], effect.mean(), atol=1e-9, rtol=1e-6)
            added = torch.zeros_like(clean)
            added[:, at] = error[:, at]
            with edit(own, {site: lambda act, added=added: act + added}):
                effect = batch.value(own(batch.clean).logits[:, -1]) - base
            torch.testing.assert_close(found.errors[0, place], effect.mean(), atol=1e-9, rtol=1e-6)


def test_exact_scores_of_some_nodes(model: GetModel) -> None:
    own, batch = model("gpt2"), some_pairs()
    cuts = {"d": scaled_dictionaries(own)["stream"]}
    all_nodes = node_scores(own, cuts, batch, method="exact")["d"]
    chosen = NodeValues(torch.zeros_like(all_nodes.latents).bool(), torch.zeros_like(all_nodes.errors).bool())
    chosen.latents[3] = True
    chosen.errors[0, 1] = True
    none = NodeValues(torch.zeros_like(chosen.latents), torch.zeros_like(chosen.errors))
    both = cuts | {"e": scaled_dictionaries(own)["mlp"]}
    scores = node_scores(own, both, batch, method=Exact({"d": chosen, "e": none}))
    assert not scores["e"].latents.any()
    found = scores["d"]
    torch.testing.assert_close(found.latents[3], all_nodes.latents[3])
    assert found.latents[3].any()
    assert not found.latents[[0, 1, 2, 4, 5]].any()
    assert (found.errors != 0).tolist() == [[False, True, False, False, False, False]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cross_layer_transcoder_adds_up_over_its_writes(model: GetModel, family: str) -> None:
    own, batch = model(family), some_pairs()
    dictionaries = scaled_cross_layer(own)
    found = node_scores(own, dictionaries, batch)["clt"]
    assert found.errors.shape == (3, 6)
    expected = torch.zeros(6, dtype=torch.float64)
    for site in dictionaries["clt"].writes:
        clean, patch = activations(own, batch, site)
        expected += (plain_gradient(own, batch, site, clean) * (patch - clean)).sum(-1).mean(0)
    torch.testing.assert_close(
        found.latents.sum(-1) + found.errors.sum(0), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )
    exact = node_scores(own, dictionaries, batch, method="exact")["clt"]
    assert torch.equal(exact.latents != 0, found.latents != 0)


def test_special_tokens_have_no_nodes(model: GetModel) -> None:
    own, batch = model("gpt2"), replace(some_pairs(), n_special=2)
    dictionaries = scaled_dictionaries(own)
    for method in ("gradient", "exact", "magnitude", "random", "integrated_gradients"):
        for nodes in node_scores(own, dictionaries, batch, method=method).values():
            assert not nodes.latents[:2].any()
            assert not nodes.errors[:, :2].any()
            assert nodes.latents[2:].any()


def test_magnitudes_by_hand(model: GetModel) -> None:
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)["transcoder"]
    found = node_scores(own, {"d": d}, batch, method="magnitude")["d"]
    x, y = (activations(own, batch, site)[0] for site in ("mlp_in.1", "mlp_out.1"))
    torch.testing.assert_close(found.latents, (d.encode(x).abs() * rows_of(d).norm(dim=1)).mean(0))
    torch.testing.assert_close(found.errors[0], (y - d(x).recon).norm(dim=-1).mean(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_equal_in_both_prompts_has_no_score(tmp_path: Path, family: str) -> None:
    """In float32 too, where the rules' forward is the model's own only up to rounding: RelP has no other candidates
    than the gradient.
    """
    own, batch = tiny_model(tmp_path, family).float(), some_pairs(n=16, ctx=9)
    same = int((batch.clean != batch.patch).any(0).nonzero()[0])
    own_dictionaries = {name: d.float() for name, d in scaled_dictionaries(own).items()}
    for method in ("gradient", RelP(), RelP(attention=True)):
        for nodes in node_scores(own, own_dictionaries, batch, method=method).values():
            assert not nodes.latents[:same].any()
            assert not nodes.errors[:, :same].any()
            assert nodes.latents[same:].any()


def test_random_scores_are_of_active_nodes(model: GetModel) -> None:
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)["stream"]
    found = node_scores(own, {"d": d}, batch, method="random")["d"]
    active = (d.encode(activations(own, batch, "resid_post.0")[0]) != 0).any(0)
    assert torch.equal(found.latents > 0, active)
    assert len(found.latents[active].unique()) == active.sum()
    again = node_scores(own, {"d": d}, batch, method="random")["d"]
    assert torch.equal(found.latents, again.latents)


def test_what_cannot_stand_in_a_model_together(model: GetModel) -> None:
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)["stream"]
    with pytest.raises(DictlearnError, match="one dictionary: a and b write resid_post"):
        node_scores(own, {"a": d, "b": d}, batch)
    with pytest.raises(DictlearnError, match="at least one dictionary"):
        node_scores(own, {}, batch)
    with pytest.raises(DictlearnError, match="has no kind 'gradients'"):
        node_scores(own, {"a": d}, batch, method="gradients")
    with pytest.raises(DictlearnError, match="positions must be one of each, all, got 'some'"):
        node_scores(own, {"a": d}, batch, positions="some")
    with pytest.raises(DictlearnError, match="metric must be one of logit_difference"):
        node_scores(own, {"a": d}, batch, metric="loss")


def test_contextual_decomposition_by_hand(model: GetModel) -> None:
    """One node: beta is what the clean prompt has more of it."""
    own, batch = model("llama"), some_pairs()
    d = scaled_dictionaries(own)["stream"]
    clean, patch = activations(own, batch, "resid_post.0")
    found = node_scores(own, {"d": d}, batch, method=CDT(n_rows=12))["d"]
    rows = torch.arange(len(batch))
    for position, latent in (found.latents != 0).nonzero()[::7].tolist():
        beta = torch.zeros_like(clean)
        more = (d.encode(clean) - d.encode(patch))[:, position, latent]
        beta[:, position] = more.unsqueeze(-1) * rows_of(d)[latent]
        logits = relevant_logits(own, batch.clean, {resolve(own, "resid_post.0"): beta})[:, -1]
        effect = logits[rows, batch.wrong[:, 0]] - logits[rows, batch.answers[:, 0]]
        torch.testing.assert_close(found.latents[position, latent], effect.mean())


def test_contextual_decomposition_in_a_linear_model_is_exact(tmp_path: Path) -> None:
    own, batch = tiny_model(tmp_path, "gpt2"), some_pairs()
    d = {"d": scaled_dictionaries(own)["attention"]}
    layers: Any = own.get_submodule("transformer.h")
    for layer in layers:
        layer.attn.c_attn.weight.data[:, : 2 * layer.attn.embed_dim] = 0
        layer.mlp.c_proj.weight.data.zero_()
    exact, found = (node_scores(own, d, batch, method=method)["d"] for method in ("exact", "cdt"))
    moving = exact.latents.abs() > 1e-3
    assert moving.sum() > 10
    # all that is left of the model are norms, whose denominators stay: nearly the exact effect of small nodes
    assert torch.corrcoef(torch.stack([exact.latents[moving], found.latents[moving]]))[0, 1] > 0.9


@pytest.mark.parametrize("name", ["mlp", "transcoder"])
def test_information_flow_of_nodes_by_hand(model: GetModel, name: str) -> None:
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)[name]
    for weight in (d.W_dec, d.W_skip, d.b_dec):
        if weight is not None and name == "transcoder":
            weight.mul_(0.01)  # of the size of what the MLP writes
    found = node_scores(own, {"d": d}, batch, method="information_flow")["d"]
    share = information_flow(own, batch.clean).sites[d.writes[0]]
    x, y = (activations(own, batch, site)[0] for site in (d.reads[0], d.writes[0]))
    code = d.encode(x)
    skip = torch.zeros_like(y) if d.W_skip is None else x @ d.W_skip.T * d.read_scale / d.write_scale
    latents, errors = torch.zeros(6, d.n_latents, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for row in range(len(batch)):
        for t in range(6):
            target = y[row, t]
            parts = [code[row, t, i] * rows_of(d)[i] for i in range(d.n_latents)]
            parts += [target - sum(parts) - skip[row, t], skip[row, t]]
            near = torch.stack([(target.abs().sum() - (target - z).abs().sum()).clamp_min(0) for z in parts])
            near = near / max(float(near.sum()), 1e-300) * share[row, t]
            latents[t] += near[:-2] / len(batch)
            errors[t] += near[-2] / len(batch)  # the skip path's is no node's
    torch.testing.assert_close(found.latents, latents)
    torch.testing.assert_close(found.errors[0], errors)
    assert float(found.latents.sum()) > 0
    with pytest.raises(DictlearnError, match=r"Information flow knows no site attn_z\.2"):
        node_scores(own, {"z": scaled_dictionaries(own)["z"]}, batch, method="information_flow")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", [False, True])
def test_relevance_of_a_site_adds_up(model: GetModel, family: str, attention: bool) -> None:
    """To the coefficients of the rules times (x_patch - x_clean)."""
    own, batch = model(family), some_pairs()
    dictionaries = scaled_dictionaries(own)
    found = node_scores(own, dictionaries, batch, method=RelP(attention))
    for name, d in dictionaries.items():
        with relevance(own, attention=attention):  # whose rounding is not that of norms in float32
            clean, _ = activations(own, batch, d.writes[0])
            coefficients = plain_gradient(own, batch, d.writes[0], clean)
            expected = (coefficients * moved_by_nodes(own, batch, d)).sum(-1).mean(0)
        total = found[name].latents.sum(-1) + found[name].errors.sum(0)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    plain = node_scores(own, dictionaries, batch)
    assert not torch.allclose(plain["stream"].latents, found["stream"].latents, rtol=0.01)


def test_before_pairs_differ_there_is_nothing(model: GetModel) -> None:
    """In a causal model; and pairs that do not differ at all have no scores."""
    own, batch = model("gpt2"), some_pairs()
    assert batch.since == 1
    later = batch.patch.clone()
    later[0, 1] = batch.clean[0, 1]
    assert replace(batch, patch=later).since == 1  # where the first pair to differ does
    same = replace(batch, patch=batch.clean)
    assert same.since == batch.ctx - 1
    for pairs, since in ((batch, 1), (same, batch.ctx)):
        found = node_scores(own, scaled_dictionaries(own), pairs)
        for nodes in found.values():
            assert not nodes.latents[:since].any()
            assert not nodes.errors[:, :since].any()
        assert bool(found["stream"].latents[since:].any()) == (pairs is batch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["transcoder", "norm"])
def test_integrated_gradients_beside_a_skip_path(model: GetModel, family: str, kind: str) -> None:
    """Scores of a site add up to what patching all its nodes does, the skip path left as it is."""
    own, batch = model(family), some_pairs()
    d = {"d": skipping(own)[kind]}
    (cut,) = cuts_of(own, d)
    found = node_scores(own, d, batch, method=IntegratedGradients(n_points=20))
    ((chunk, ablated),) = Ablation(own, [cut], batch, "patch").chunks()
    empty = everything(found, latents=False, errors=False)
    with torch.no_grad():
        whole = batch.value(own(batch.clean).logits[:, -1]).mean()
    exact = float(run_circuit(own, [cut], chunk, empty, ablated).mean() - whole)
    total = float(found["d"].latents.sum() + found["d"].errors.sum())
    assert total == pytest.approx(exact, rel=0.01)

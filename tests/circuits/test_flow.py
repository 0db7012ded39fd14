"""Information flow routes against a slow version of edge after edge, and in models with closed forms."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.circuits.flow import information_flow
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture
from dictlearn.types import DictlearnError, Site
from tests.tiny_lms import CONFIGS

GetModel = Callable[[str], PreTrainedModel]
IDS = torch.randint(2, 97, (2, 7), generator=torch.Generator().manual_seed(3))
N_LAYERS, N_HEADS = 3, 2
KINDS = ("resid_pre", "attn_out", "mlp_out", "resid_post")
SLOW = {  # family: module of the values, how it gives them, output projection, below a layer
    "gpt2": ("attn.c_attn", lambda qkv, head: qkv[..., 32:].chunk(2, -1)[head], "attn.c_proj"),
    "gpt_neox": ("attention.query_key_value", lambda qkv, head: qkv.chunk(6, -1)[3 * head + 2], "attention.dense"),
    "llama": ("self_attn.v_proj", lambda v, _: v, "self_attn.o_proj"),
    "gemma2": ("self_attn.v_proj", lambda v, _: v, "self_attn.o_proj"),
    "phi": ("self_attn.v_proj", lambda v, _: v, "self_attn.dense"),
}


def nearness(y: Tensor, z: Tensor) -> float:
    return max(0.0, float(sum(abs(a) for a in y.tolist()) - sum(abs(a) for a in (y - z).tolist())))


def slow_flow(model: PreTrainedModel, family: str, row: int) -> dict[tuple[str, int], float]:
    """Shares by site or head and position: edges one by one, pushed down from the last position."""
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    values, value_of, projection = SLOW[family]
    layer_paths = [resolve(own, f"resid_post.{layer}").module for layer in range(N_LAYERS)]
    sites = [resolve(own, f"{kind}.{layer}") for kind in KINDS for layer in range(N_LAYERS)]
    sites += [Site(f"{p}.{name}", f"{p}.{name}", "out") for p in layer_paths for name in (values, projection)]
    with torch.no_grad(), capture(own, sites) as acts:
        patterns = own(IDS[[row]], output_attentions=True).attentions
    share: dict[tuple[str, int], float] = defaultdict(float)
    share[f"resid_post.{N_LAYERS - 1}", 6] = 1.0
    for layer in reversed(range(N_LAYERS)):
        pre, attn, mlp, post = (acts[f"{kind}.{layer}"][0] for kind in KINDS)
        project = own.get_submodule(f"{layer_paths[layer]}.{projection}")
        raw = acts[f"{layer_paths[layer]}.{projection}"][0]
        for t in range(7):
            edges: list[tuple[tuple[str, int], Tensor]] = []  # to the node that a contribution comes from
            for head in range(N_HEADS):
                for s in range(t + 1):
                    value = value_of(acts[f"{layer_paths[layer]}.{values}"][0], head)[s]
                    z = torch.zeros(N_HEADS, len(value), dtype=value.dtype)
                    z[head] = patterns[layer][0, head, t, s] * value
                    added = (project(z.flatten()) - project(torch.zeros_like(z).flatten())).detach()
                    if family == "gemma2":
                        norm = own.get_submodule(f"{layer_paths[layer]}.post_attention_layernorm")
                        rms = (raw[t].square().mean() + 1e-6).sqrt()
                        added = added * (1 + norm.get_parameter("weight").detach()) / rms
                    edges.append(((f"{head}>{s}", t), added))
            mid = pre[t] + attn[t]
            edges.append(((f"resid_pre.{layer}", t), pre[t]))
            top = (f"resid_post.{layer}", t)
            if family in ("gpt_neox", "phi"):
                edges.append(((f"mlp_out.{layer}", t), mlp[t]))
                push(share, top, post[t], edges)
                share[f"resid_pre.{layer}", t] += share[f"mlp_out.{layer}", t]
            else:
                below = (f"resid_mid.{layer}", t)
                push(share, top, post[t], [(below, mid), ((f"mlp_out.{layer}", t), mlp[t])])
                share[below] += share[f"mlp_out.{layer}", t]
                push(share, below, mid, edges)
            for head in range(N_HEADS):
                for s in range(t + 1):
                    through = share.pop((f"{head}>{s}", t))
                    share[f"resid_pre.{layer}", s] += through
                    share[f"attn_out.{layer}", t] += through
                    share[f"head.{layer}.{head}", t] += through
        for t in range(7):
            share[f"resid_post.{layer - 1}", t] = share[f"resid_pre.{layer}", t]
    return share


def push(share: dict, node: tuple[str, int], y: Tensor, edges: list[tuple[tuple[str, int], Tensor]]) -> None:
    near = [nearness(y, z) for _, z in edges]
    for (below, _), own in zip(edges, near, strict=True):
        share[below] += share[node] * own / sum(near)


@pytest.mark.parametrize("family", SLOW)
def test_against_a_slow_version(model: GetModel, family: str) -> None:
    """Also with grouped queries, a sliding window, post-norms, and attention and MLP in parallel."""
    own = model(family)
    found = information_flow(own, IDS)
    for row in range(len(IDS)):
        expected = slow_flow(own, family, row)
        for name, shares in found.sites.items():
            wanted = torch.tensor([expected[name, t] for t in range(7)], dtype=torch.float64)
            torch.testing.assert_close(shares[row], wanted, rtol=1e-5, atol=1e-6)
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                wanted = [expected[f"head.{layer}.{head}", t] for t in range(7)]
                heads = found.heads[row, layer, head]
                torch.testing.assert_close(heads, torch.tensor(wanted).to(heads), rtol=1e-5, atol=1e-6)
    parallel = family in ("gpt_neox", "phi")
    assert len(found.sites) == N_LAYERS * (4 if parallel else 5)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in ("gptj", "opt_post_norm")])
def test_shares_add_up(model: GetModel, family: str) -> None:
    own = model(family)
    plain = own(IDS).logits
    found = information_flow(own, IDS)
    ones = torch.ones(len(IDS), dtype=torch.float64)
    for name, shares in found.sites.items():
        assert (shares >= 0).all()
        if name.startswith("resid"):
            torch.testing.assert_close(shares.sum(-1), ones)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(found.heads[:, layer].sum(1), found.sites[f"attn_out.{layer}"])
        if layer:
            assert torch.equal(found.sites[f"resid_pre.{layer}"], found.sites[f"resid_post.{layer - 1}"])
    assert found.sites["attn_out.0"].max() > 0.01
    assert torch.equal(own(IDS).logits, plain)


def test_a_model_that_adds_nothing(model: GetModel) -> None:
    """All stays in the stream of the last position."""
    own = copy.deepcopy(model("gpt2"))
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if ".c_proj." in name:
                parameter.zero_()
    found = information_flow(own, IDS)
    last = torch.zeros(len(IDS), 7, dtype=torch.float64)
    last[:, -1] = 1
    for name, shares in found.sites.items():
        torch.testing.assert_close(shares, last if name.startswith("resid") else 0 * last, rtol=1e-14, atol=0)


def test_a_head_that_moves_everything(model: GetModel) -> None:
    """Head 1 of layer 1 alone adds, and so much that nearly all comes from where it looks: the positions before,
    all alike, from which it takes the same vector."""
    own = copy.deepcopy(model("gpt2"))
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if ".c_proj." in name:
                parameter.zero_()
        attention = own.get_submodule("transformer.h.1.attn")
        weight, bias = (attention.get_parameter(f"c_attn.{name}") for name in ("weight", "bias"))
        weight.zero_()  # even patterns, values from the bias alone
        bias[32:] = 1
        attention.get_parameter("c_proj.weight")[8:] = 1e6
    found = information_flow(own, IDS)
    even = torch.full((len(IDS), 7), 1 / 7, dtype=torch.float64)
    torch.testing.assert_close(found.sites["resid_pre.1"], even, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.heads[:, 1, 1, -1], 7 * even[:, 0], rtol=1e-4, atol=0)
    assert not found.heads[:, 1, 0].any()


def test_where_contributions_do_not_sum_up(model: GetModel) -> None:
    with pytest.raises(DictlearnError, match="norms stand on the residual stream itself"):
        information_flow(model("opt_post_norm"), IDS)
    with pytest.raises(DictlearnError, match="not for 'gptj'"):
        information_flow(model("gptj"), IDS)

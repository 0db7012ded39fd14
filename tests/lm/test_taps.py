"""Capture reads without changing anything, edit changes what it says, the forward stops where it may."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dictlearn.lm import activations, capture, edit, load_lm, resolve
from dictlearn.types import DictlearnError, Site
from tests.lm.reference import REFERENCES
from tests.lm.test_sites import ABSENT, names

SITES = ["embed", "resid_pre.1", "resid_post.1", "attn_in.1", "attn_z.1", "attn_out.1", "mlp_in.1", "mlp_hidden.1"]
SITES += ["mlp_out.1"]


@torch.no_grad()
def logits(lm, input_ids):
    return lm(input_ids).logits


def n_hooks(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.modules())


@pytest.mark.parametrize("family", REFERENCES)
def test_capture_leaves_logits_bit_identical(model, input_ids, family):
    lm = model(family)
    clean, before = logits(lm, input_ids), n_hooks(lm)
    sites = [resolve(lm, name) for name in names(family)]
    with capture(lm, sites) as acts:
        assert torch.equal(logits(lm, input_ids), clean)
    assert n_hooks(lm) == before
    assert acts.keys() == set(names(family))
    stopped = activations(lm, sites, input_ids)
    assert all(torch.equal(acts[name], stopped[name]) for name in acts)
    with capture(lm, sites) as acts:
        assert torch.equal(logits(lm, input_ids[:1]), logits(lm, input_ids[:1]))
    assert acts["resid_post.0"].shape == (1, 7, 16)  # the last forward counts


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "gemma3", "olmo2", "opt", "phi"])
@pytest.mark.parametrize("name", SITES)
def test_identity_edits_change_nothing_and_zero_edits_do(model, input_ids, family, name):
    lm = model(family)
    clean, before, site = logits(lm, input_ids), n_hooks(lm), resolve(lm, name)
    with edit(lm, {site: torch.clone}):
        assert torch.equal(logits(lm, input_ids), clean)
    with edit(lm, {site: torch.zeros_like}):
        assert (logits(lm, input_ids) - clean).abs().max() > 1e-2
    assert n_hooks(lm) == before
    assert torch.equal(logits(lm, input_ids), clean)


@pytest.mark.parametrize(("family", "weight"), [("gpt2", "c_proj.weight"), ("llama", "o_proj.weight")])
def test_zeroing_a_head_of_attn_z_equals_zeroing_its_rows_of_the_projection(model, input_ids, family, weight):
    lm = model(family)
    changed = copy.deepcopy(lm)
    (parameter,) = [p for n, p in changed.named_parameters() if n.endswith(weight) and ".1." in n and "attn" in n]
    rows = parameter.data if family == "gpt2" else parameter.data.T  # [heads * d_head, d_model]
    rows[8:] = 0  # the second of two heads of width 8

    def without_head(z):
        return torch.cat([z[..., :8], torch.zeros_like(z[..., 8:])], dim=-1)

    with edit(lm, {resolve(lm, "attn_z.1"): without_head}):
        edited = logits(lm, input_ids)
    assert torch.equal(edited, logits(changed, input_ids))
    assert not torch.equal(edited, logits(lm, input_ids))


def test_inputs_passed_by_keyword_are_read_and_replaced(model, input_ids):
    lm = model("llama")  # its layers call self_attn(hidden_states=...)
    changed = copy.deepcopy(lm)
    changed.model.layers[1].input_layernorm.weight.data *= 2  # a power of two: exact
    site = resolve(lm, "attn_in.1")
    with edit(lm, {site: lambda x: 2 * x}), capture(lm, [site]) as acts:
        assert torch.equal(logits(lm, input_ids), logits(changed, input_ids))
    assert torch.equal(acts["attn_in.1"], 2 * activations(lm, [site], input_ids)["attn_in.1"])


def test_edits_reach_everything_downstream(model, input_ids):
    lm, delta = model("gpt2"), torch.randn(16)
    sites = [resolve(lm, name) for name in ("resid_mid.2", "resid_pre.2", "attn_out.2")]
    with edit(lm, {sites[2]: lambda x: delta.expand_as(x)}):
        acts = activations(lm, sites, input_ids)
    assert_close(acts["resid_mid.2"] - acts["resid_pre.2"], delta.expand(3, 7, 16), rtol=1e-4, atol=1e-4)


WITH_RESID_MID = [family for family in REFERENCES if "resid_mid" not in ABSENT.get(family, ())]


@pytest.mark.parametrize("family", WITH_RESID_MID)
def test_an_edit_of_resid_mid_changes_the_stream(model, input_ids, family):
    """What follows is that of the stream itself, not only of what the MLP reads of it."""
    lm, new = model(family), torch.randn(3, 7, 16)
    names = ("resid_mid.2", "mlp_out.2", "resid_post.2", "resid_pre.3")
    mid, mlp_out, post, after = sites = [resolve(lm, name) for name in names]
    before, clean = n_hooks(lm), logits(lm, input_ids)
    with capture(lm, [post]) as outer, edit(lm, {mid: lambda _: new}):
        acts = activations(lm, sites, input_ids)
        edited = logits(lm, input_ids)
    assert torch.equal(acts["resid_mid.2"], new)
    for name in ("resid_post.2", "resid_pre.3"):
        assert_close(acts[name], new + acts["mlp_out.2"], rtol=1e-4, atol=1e-4)
    assert torch.equal(outer["resid_post.2"], acts["resid_post.2"])  # hooks from before the edit see it as well
    with edit(lm, {post: lambda _: new + acts["mlp_out.2"]}):
        assert_close(logits(lm, input_ids), edited, rtol=1e-4, atol=1e-4)
    with edit(lm, {mid: lambda _: new}), edit(lm, {mlp_out: torch.zeros_like}):
        assert_close(activations(lm, [after], input_ids)["resid_pre.3"], new, rtol=1e-4, atol=1e-4)
    with (
        edit(lm, {mid: lambda _: new}),
        pytest.raises(ZeroDivisionError),
        edit(lm, {mlp_out: lambda x: x / (1 // 0)}),
    ):
        logits(lm, input_ids)  # a forward that ends in between leaves nothing behind
    assert torch.equal(logits(lm, input_ids), clean)
    assert n_hooks(lm) == before


def test_gradients_of_an_edited_resid_mid_are_those_of_the_stream(model, input_ids):
    lm, new = model("llama"), torch.randn(3, 7, 16, requires_grad=True)
    embeds = lm.get_input_embeddings()(input_ids).detach().requires_grad_()
    with edit(lm, {resolve(lm, "resid_mid.3"): lambda _: new}), capture(lm, [resolve(lm, "resid_post.3")]) as acts:
        lm(inputs_embeds=embeds)
    got = torch.autograd.grad(acts["resid_post.3"].sum(), (new, embeds), allow_unused=True, materialize_grads=True)
    layer = lm.model.layers[3]
    stream = new + layer.mlp(layer.post_attention_layernorm(new))
    (expected,) = torch.autograd.grad(stream.sum(), new)
    assert_close(got[0], expected)
    assert_close(got[1], torch.zeros_like(embeds))  # nothing passes by


@pytest.mark.parametrize(
    "name", ["resid_mid.1", "mlp_in.1", "mlp_hidden.1", "mlp_out.1", "model.decoder.layers.1.fc1"]
)
def test_modules_that_see_all_tokens_as_one_row(model, input_ids, name):
    """The MLPs of OPT work on [rows * ctx, d]: read and edited as [rows, ctx, d]."""
    lm = model("opt")
    site = resolve(lm, name)
    act = activations(lm, [site], input_ids)[name]
    assert act.shape == (3, 7, 64 if name in ("mlp_hidden.1", "model.decoder.layers.1.fc1") else 16)
    for row in range(3):
        alone = activations(lm, [site], input_ids[row : row + 1])[name]
        assert_close(act[row], alone[0], rtol=1e-4, atol=1e-4)
    with capture(lm, [site]) as acts:
        lm(inputs_embeds=lm.get_input_embeddings()(input_ids))
    assert torch.equal(acts[name], act)

    def zero_second_row(x):
        return torch.cat([x[:1], torch.zeros_like(x[1:2]), x[2:]])

    with edit(lm, {site: zero_second_row}):
        edited = logits(lm, input_ids)
    changed = (edited - logits(lm, input_ids)).abs().amax((1, 2))
    assert changed[1] > 1e-2
    assert changed[[0, 2]].max() == 0


def test_the_outer_block_comes_first(model, input_ids):
    lm = model("gpt2")
    site = resolve(lm, "resid_post.1")
    clean = activations(lm, [site], input_ids)["resid_post.1"]
    with capture(lm, [site]) as before, edit(lm, {site: lambda x: 2 * x}), capture(lm, [site]) as after:
        logits(lm, input_ids)
    assert torch.equal(before["resid_post.1"], clean)
    assert torch.equal(after["resid_post.1"], 2 * clean)


def test_gradients_flow_through_edits_and_captures(model, input_ids):
    lm, steering = model("gpt2"), torch.zeros(16, requires_grad=True)
    late = resolve(lm, "resid_post.3")
    with edit(lm, {resolve(lm, "resid_post.1"): lambda x: x + steering}), capture(lm, [late]) as acts:
        lm(input_ids)
    (grad,) = torch.autograd.grad(acts["resid_post.3"].square().sum(), steering)
    assert grad.abs().min() > 0


class Attention(nn.Module):
    """Returns a tuple, and takes its input by keyword."""

    def forward(self, hidden_states, scale=1.0):
        return scale * hidden_states, "weights", None


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.unused, self.pair = Attention(), nn.Identity(), nn.Identity()

    def forward(self, x):
        self.pair((x, x))
        return self.attn(hidden_states=x, scale=3.0)


def test_editing_a_tuple_keeps_its_other_elements():
    toy, x = Toy(), torch.ones(1, 2, 3)
    with edit(toy, {Site("a", "attn", "out"): lambda act: act + 1, Site("b", "attn", "in"): lambda act: act + 10}):
        out = toy(x)
    assert torch.equal(out[0], torch.full((1, 2, 3), 34.0))
    assert out[1:] == ("weights", None)


def test_hooks_are_removed_after_an_error(model, input_ids):
    lm = model("gpt2")
    clean, before, site = logits(lm, input_ids), n_hooks(lm), resolve(lm, "attn_z.1")

    def fails(act):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(lm, [site]), edit(lm, {site: fails}):
        lm(input_ids)
    with pytest.raises(AttributeError):  # the second site does not exist: the hook of the first one goes
        activations(lm, [site, Site("x", "transformer.x", "in")], input_ids)
    assert n_hooks(lm) == before
    assert torch.equal(logits(lm, input_ids), clean)


@pytest.mark.parametrize(
    ("wanted", "n_attn", "n_mlp"),
    [
        (["embed"], 0, 0),
        (["resid_pre.0"], 0, 0),
        (["attn_in.1"], 1, 1),
        (["attn_z.1"], 1, 1),  # inside the attention, which therefore does not finish
        (["attn_out.1"], 2, 1),
        (["resid_mid.1"], 2, 1),
        (["mlp_out.1"], 2, 2),
        (["resid_post.1"], 2, 2),
        (["resid_post.1", "embed", "attn_out.0"], 2, 2),  # the latest site comes first
        (["mlp_in.0", "resid_pre.3", "resid_pre.1"], 3, 3),
        (["resid_post.3"], 4, 4),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox_sequential", "llama"])
def test_the_forward_stops_after_the_last_site(model, input_ids, family, wanted, n_attn, n_mlp):
    lm = model(family)
    clean, ran, handles = logits(lm, input_ids), [], []
    for name, module in lm.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in ("attn", "attention", "self_attn", "mlp", "ln_f", "norm", "final_layer_norm", "lm_head"):
            handles.append(module.register_forward_hook(lambda *_, last=last: ran.append(last)))
    try:
        acts = activations(lm, [resolve(lm, name) for name in wanted], input_ids)
    finally:
        for handle in handles:
            handle.remove()
    assert list(acts) == wanted
    assert len([name for name in ran if "att" in name]) == n_attn
    assert ran.count("mlp") == n_mlp
    assert len(ran) == n_attn + n_mlp  # no final norm, no logits
    assert torch.equal(logits(lm, input_ids), clean)


def test_activations_are_inference_tensors_in_the_dtype_of_the_model(folder, input_ids):
    lm = load_lm(str(folder("gpt2")), dtype="bfloat16")
    sites = [resolve(lm.model, name) for name in ("attn_z.1", "resid_post.2")]
    for act in activations(lm.model, sites, input_ids).values():
        assert act.dtype == torch.bfloat16
        assert act.is_inference()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_attention_mask_reaches_the_model(model, input_ids, family):
    lm = model(family)
    site = resolve(lm, "resid_post.2")
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, 2:] = False
    padded = activations(lm, [site], input_ids, mask)["resid_post.2"]
    for row, n_tokens in enumerate((5, 2, 7)):
        alone = activations(lm, [site], input_ids[row : row + 1, :n_tokens])["resid_post.2"][0]
        assert_close(padded[row, :n_tokens], alone, rtol=1e-4, atol=1e-4)
    first_hidden = torch.ones_like(mask)
    first_hidden[:, 0] = False  # later tokens no longer attend to the first
    with torch.inference_mode():
        hidden = lm(input_ids, attention_mask=first_hidden, output_hidden_states=True).hidden_states[3]
    masked = activations(lm, [site], input_ids, first_hidden)["resid_post.2"]
    assert_close(masked[:, 1:], hidden[:, 1:])
    assert (masked[:, 1:] - padded[:, 1:])[2].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "path", "message"),
    [
        ("gpt2", "lm_head", r"Sites lm_head were not reached: .*without logits"),
        (
            "gpt2",
            "transformer.wpe",
            r"'transformer.wpe' must have one activation per token: .*\[1, 7, 16\].*\[3, 7\]",
        ),
        ("gpt2", "transformer.wte:in", r"must have floating-point activations.*got torch.int64 \[3, 7\]"),
        ("gpt2", "transformer", r"must have floating-point activations.*got BaseModelOutput"),
        ("qwen3", "model.layers.0.self_attn.q_norm", r"got torch.float32 \[3, 7, 2, 12\]"),
    ],
)
def test_what_is_not_an_activation_is_refused(model, input_ids, family, path, message):
    lm = model(family)
    before, sites = n_hooks(lm), [resolve(lm, "resid_post.1"), resolve(lm, path)]
    with pytest.raises(DictlearnError, match=message):
        activations(lm, sites, input_ids)
    assert n_hooks(lm) == before


def test_an_edit_keeps_shape_and_dtype(model, input_ids):
    lm = model("gpt2")
    site = resolve(lm, "resid_post.1")
    for wrong, got in (
        (torch.Tensor.double, r"\[3, 7, 16\] torch.float64"),
        (lambda x: x[..., :4], r"\[3, 7, 4\]"),
    ):
        with edit(lm, {site: wrong}), pytest.raises(DictlearnError, match=r"must return \[3, 7, 16\].*got " + got):
            logits(lm, input_ids)

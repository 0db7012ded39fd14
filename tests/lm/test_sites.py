"""Site names: what they resolve to, that each holds the quantity it names, and the errors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dictlearn.lm import activations, file_name, resolve, resolve_pair, site_width, skeleton, widths
from dictlearn.lm.sites import FAMILIES, KINDS, is_attention_output
from dictlearn.types import DictlearnError, Site
from tests.lm.reference import REFERENCES

N_LAYERS = 4
ABSENT = {
    "gpt_neox": {"resid_mid"},
    "phi": {"resid_mid"},
    "opt_post_norm": {"resid_mid", "attn_out", "mlp_out"},
}
OPEN_MLP = {"gpt2", "gpt_neox", "gpt_neox_sequential", "opt", "opt_post_norm"}  # 4 d_model wide, the others 3
POST_NORMED = ["gemma2", "gemma3_text", "gemma3", "olmo2"]


def names(family: str) -> list[str]:
    """All readable names of a tiny LM."""
    kinds = [k for k in KINDS if k not in {"embed"} | ABSENT.get(family, set())]
    return ["embed", *(f"{kind}.{layer}" for layer in range(N_LAYERS) for kind in kinds)]


def test_every_family_of_the_table_is_tested(model):
    assert {model(family).config.get_text_config().model_type for family in REFERENCES} == set(FAMILIES)


@pytest.mark.parametrize("family", REFERENCES)
def test_every_site_equals_a_computation_from_the_weights(model, input_ids, family):
    lm = model(family)
    expected = REFERENCES[family](lm.state_dict(), lm.config, input_ids)
    with torch.inference_mode():
        assert_close(lm(input_ids).logits, expected.pop("logits"), rtol=1e-4, atol=1e-4)
    assert expected.keys() == set(names(family))
    acts = activations(lm, [resolve(lm, name) for name in expected], input_ids)
    for name, value in expected.items():
        assert_close(acts[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", REFERENCES)
def test_sites_agree_with_each_other_and_with_hidden_states(model, input_ids, family):
    lm = model(family)
    acts = activations(lm, [resolve(lm, name) for name in names(family)], input_ids)
    with torch.inference_mode():
        hidden = lm(input_ids, output_hidden_states=True).hidden_states
    for i in range(N_LAYERS):
        pre = acts[f"resid_pre.{i}"]
        assert torch.equal(pre, hidden[i])
        if i:
            assert torch.equal(pre, acts[f"resid_post.{i - 1}"])
        if "attn_out" not in ABSENT.get(family, ()):
            assert_close(pre + acts[f"attn_out.{i}"] + acts[f"mlp_out.{i}"], acts[f"resid_post.{i}"])
        if "resid_mid" not in ABSENT.get(family, ()):
            assert_close(pre + acts[f"attn_out.{i}"], acts[f"resid_mid.{i}"])


@pytest.mark.parametrize("family", POST_NORMED)
def test_a_contribution_and_the_raw_output_of_its_module_are_two_sites(model, input_ids, family):
    """And `mlp.L` reads what the MLP reads and writes what it adds to the stream."""
    lm = model(family)
    layer = resolve(lm, "resid_post.2").module
    pairs = {"attn_out.2": f"{layer}.self_attn", "mlp_out.2": f"{layer}.mlp", "mlp_in.2": f"{layer}.mlp:in"}
    acts = activations(lm, [resolve(lm, name) for name in (*pairs, *pairs.values())], input_ids)
    for name, raw in list(pairs.items())[:2]:
        assert (acts[name] - acts[raw]).abs().max() > 0.1
        norm = lm.get_submodule(resolve(lm, name).module)
        assert torch.equal(norm(acts[raw]), acts[name])
    assert resolve_pair(lm, "mlp.2") == (resolve(lm, "mlp_in.2"), resolve(lm, "mlp_out.2"))
    assert torch.equal(acts["mlp_in.2"], acts[f"{layer}.mlp:in"])
    assert torch.equal(lm.get_submodule(f"{layer}.mlp")(acts["mlp_in.2"]), acts[f"{layer}.mlp"])


def test_on_olmo2_the_modules_read_the_stream_itself(model, input_ids):
    lm = model("olmo2")
    names = ("resid_pre.2", "attn_in.2", "resid_mid.2", "mlp_in.2")
    acts = activations(lm, [resolve(lm, name) for name in names], input_ids)
    assert torch.equal(acts["resid_pre.2"], acts["attn_in.2"])
    assert torch.equal(acts["resid_mid.2"], acts["mlp_in.2"])


@pytest.mark.parametrize("family", REFERENCES)
def test_a_skeleton_resolves_like_the_model(model, folder, family):
    lm, empty = model(family), skeleton(str(folder(family)))
    for name in [*names(family), next(path for path, _ in lm.named_modules() if path.endswith(".1"))]:
        assert resolve(empty, name) == resolve(lm, name)


@pytest.mark.parametrize("family", REFERENCES)
def test_widths_are_known_without_running_the_model(model, folder, family):
    lm, empty = model(family), skeleton(str(folder(family)))
    sites = [resolve(lm, name) for name in names(family)]
    found = {site.name: site_width(empty, site) for site in sites}
    assert found == widths(lm, sites)
    assert set(found.values()) >= {16, 64 if family in OPEN_MLP else 48}


def test_widths_by_module_path(model):
    lm = model("gpt2")
    known = {"transformer.h.1.mlp.c_fc": 64, "transformer.h.1.mlp.c_fc:in": 16, "transformer.wte": 16}
    for name, width in known.items():
        assert site_width(lm, resolve(lm, name)) == width
    assert site_width(lm, resolve(lm, "transformer.h.1.mlp")) is None
    assert site_width(model("gptj"), resolve(model("gptj"), "transformer.h.1.mlp.fc_out:in")) == 64


def test_widths(model):
    lm = model("qwen3")  # 2 heads of 12, d_model 16, MLP of 48
    sites = [resolve(lm, name) for name in ("mlp_hidden.0", "attn_z.3", "resid_mid.1")]
    assert widths(lm, sites) == {"mlp_hidden.0": 48, "attn_z.3": 24, "resid_mid.1": 16}


def test_a_module_path_is_its_output_or_its_input(model, input_ids):
    lm = model("gpt2")
    assert resolve(lm, "transformer.h.2.mlp") == Site("transformer.h.2.mlp", "transformer.h.2.mlp", "out")
    assert resolve(lm, "transformer.h.2.mlp:in") == Site("transformer.h.2.mlp:in", "transformer.h.2.mlp", "in")
    readable, paths = (
        ["mlp_out.2", "mlp_in.2", "embed"],
        ["transformer.h.2.mlp", "transformer.h.2.mlp:in", "transformer.wte"],
    )
    acts = activations(lm, [resolve(lm, name) for name in readable + paths], input_ids)
    for name, path in zip(readable, paths, strict=True):
        assert torch.equal(acts[name], acts[path])


def test_module_paths_work_for_families_without_readable_names(model, input_ids):
    lm = model("gptj")
    site = resolve(lm, "transformer.h.1")
    with torch.inference_mode():
        hidden = lm(input_ids, output_hidden_states=True).hidden_states
    assert torch.equal(activations(lm, [site], input_ids)[site.name], hidden[2])


def test_the_base_model_has_the_same_sites(model, input_ids):
    lm = model("llama")
    sites = [resolve(lm, "resid_post.1")], [resolve(lm.base_model, "resid_post.1")]
    assert sites[1][0].module == "layers.1"
    whole, base = activations(lm, sites[0], input_ids), activations(lm.base_model, sites[1], input_ids)
    assert torch.equal(whole["resid_post.1"], base["resid_post.1"])


def test_pairs(model):
    lm = model("gpt2")
    assert resolve_pair(lm, "mlp.2") == (resolve(lm, "mlp_in.2"), resolve(lm, "mlp_out.2"))
    for name in ("resid_post.0", "transformer.h.1.mlp"):
        assert resolve_pair(lm, name) == (resolve(lm, name), resolve(lm, name))
    with pytest.raises(DictlearnError, match=r"layer must be 0 to 3"):
        resolve_pair(lm, "mlp.4")


@pytest.mark.parametrize("family", REFERENCES)
def test_what_attention_writes_is_known_by_any_name(model, family):
    lm = model(family)
    kinds = {name.partition(".")[0] for name in names(family) if is_attention_output(lm, resolve(lm, name))}
    assert kinds == {"attn_out"} - ABSENT.get(family, set())
    read, projected = (resolve(lm, f"{kind}.1").module for kind in ("attn_in", "attn_z"))
    for path, expected in ((read, True), (projected, True), (f"{projected}:in", False)):
        assert is_attention_output(lm, resolve(lm, path)) == expected, path


def test_file_names():
    assert file_name("resid_post.2") == "resid_post.2"
    assert file_name("transformer.h.2.mlp:in") == "transformer.h.2.mlp-in"
    assert file_name("a/b c=1,d") == "a-b-c-1-d"


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("gpt2", "resid_post.4", r"'resid_post.4'.* layer must be 0 to 3"),
        ("gpt2", "resid_post.-1", r"layer must be 0 to 3"),
        ("gpt2", "resid_post.01", r"layer must be 0 to 3"),
        ("gpt2", "resid_post", r"layer must be 0 to 3, as in 'resid_post.0'"),
        ("gpt2", "resid_post.1:in", r"layer must be 0 to 3"),
        ("gpt2", "embed.0", r"embed has no layer"),
        ("gpt2", "resid_pots.2", r"Did you mean resid_post.2 or .*embed, or resid_pre .*layer from 0 to 3"),
        ("gpt2", "mlp.2", r"no site 'mlp.2'.*Did you mean .*mlp_in.2"),
        ("gpt2", "transfomer.h.2.mlp", r"Did you mean transformer.h.2.mlp or"),
        ("gpt2", "transformer.h.7", r"Did you mean transformer.h.\d"),
        ("gpt2", "transformer.h", r"no site 'transformer.h'"),  # a list of modules never runs
        ("gpt2", "", r"no site ''.*any module path \(like transformer\)"),
        ("gpt_neox", "resid_mid.1", r"use_parallel_residual=True.*resid_pre.1.*Take attn_out.1 or resid_post.1"),
        ("phi", "resid_mid.1", r"in this architecture attention and MLP both read resid_pre.1.*Take attn_out.1 or"),
        *(
            (
                "opt_post_norm",
                name,
                rf"'{name}' .*do_layer_norm_before=False norms stand on .*OPT-350m.*resid_post.1",
            )
            for name in ("resid_mid.1", "attn_out.1", "mlp_out.1")
        ),
        ("gptj", "resid_post.1", r"known for gpt2, .*phi models, not for 'gptj'.*e.g. transformer.h.0, "),
        ("gptj", "transformer.g.1", r"Did you mean transformer.h.1 .*A site is any module path"),
    ],
)
def test_errors_state_the_rule_and_the_choices(model, family, name, message):
    with pytest.raises(DictlearnError, match=message):
        resolve(model(family), name)

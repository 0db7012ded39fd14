"""Site names: what they resolve to, that each holds the quantity it names, and the errors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dictlearn.lm import activations, file_name, resolve, resolve_pair, skeleton, widths
from dictlearn.lm.sites import FAMILIES, KINDS
from dictlearn.types import DictlearnError, Site
from tests.lm.reference import REFERENCES

N_LAYERS = 4


def names(family: str) -> list[str]:
    """All readable names of a tiny LM."""
    kinds = [k for k in KINDS if k != "embed" and (k, family) != ("resid_mid", "gpt_neox")]
    return ["embed", *(f"{kind}.{layer}" for layer in range(N_LAYERS) for kind in kinds)]


def test_every_family_of_the_table_is_tested(model):
    assert {model(family).config.model_type for family in REFERENCES} == set(FAMILIES)


@pytest.mark.parametrize("family", REFERENCES)
def test_every_site_equals_a_computation_from_the_weights(model, input_ids, family):
    lm = model(family)
    expected = REFERENCES[family](lm.state_dict(), lm.config, input_ids)
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
        pre, attn, mlp = acts[f"resid_pre.{i}"], acts[f"attn_out.{i}"], acts[f"mlp_out.{i}"]
        assert torch.equal(pre, hidden[i])
        assert_close(pre + attn + mlp, acts[f"resid_post.{i}"])
        if family != "gpt_neox":
            assert_close(pre + attn, acts[f"resid_mid.{i}"])
        if i:
            assert torch.equal(pre, acts[f"resid_post.{i - 1}"])


@pytest.mark.parametrize("family", REFERENCES)
def test_a_skeleton_resolves_like_the_model(model, folder, family):
    lm, empty = model(family), skeleton(str(folder(family)))
    for name in [*names(family), next(path for path, _ in lm.named_modules() if path.endswith(".mlp"))]:
        assert resolve(empty, name) == resolve(lm, name)


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
    lm = model("opt")
    site = resolve(lm, "model.decoder.layers.1")
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
        ("opt", "resid_post.1", r"known for gpt2, .*gemma models, not for 'opt'.*e.g. model.decoder.layers.0, "),
        ("opt", "model.decoder.layer.1", r"Did you mean model.decoder.layers.1 .*A site is any module path"),
    ],
)
def test_errors_state_the_rule_and_the_choices(model, family, name, message):
    with pytest.raises(DictlearnError, match=message):
        resolve(model(family), name)

"""What is known of a released dictionary beside its weights."""

from __future__ import annotations

import pytest

from dictlearn.hub.origin import MODEL_TYPES, hf_id, modules_of, stated_l0
from dictlearn.lm.sites import FAMILIES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", "gpt2"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("somebody/unknown", "somebody/unknown"),
        ("", None),
        (None, None),
        (5, None),
    ],
)
def test_the_language_models_id(name: object, expected: str | None) -> None:
    assert hf_id(name) == expected


@pytest.mark.parametrize(
    ("lm", "site", "path"),
    [
        ("gpt2", "resid_pre.8", "h.8:in"),
        ("gpt2", "attn_z.3", "h.3.attn.c_proj:in"),
        ("EleutherAI/pythia-70m-deduped", "mlp_out.2", "layers.2.mlp"),
        ("google/gemma-2-2b", "mlp_out.2", "layers.2.post_feedforward_layernorm"),
        ("google/gemma-2b", "mlp_out.2", "layers.2.mlp"),
        ("google/gemma-3-270m", "resid_mid.0", "layers.0.pre_feedforward_layernorm:in"),
        ("google/gemma-3-4b-it", "resid_post.7", "language_model.layers.7"),
        ("meta-llama/Llama-3.1-8B-Instruct", "resid_post.19", "layers.19"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "resid_post.19", "layers.19"),
        ("Qwen/Qwen3-1.7B-Base", "mlp_in.1", "layers.1.mlp:in"),
    ],
)
def test_the_modules_of_its_sites(lm: str, site: str, path: str) -> None:
    assert modules_of(lm, [site]) == {site: path}


def test_no_module_is_guessed() -> None:
    assert modules_of(None, ["resid_post.1"]) == modules_of("someone/strange", ["resid_post.1"]) == {}
    assert modules_of("gpt2", ["x", "transformer.h.1", "resid_post.one"]) == {}
    assert set(MODEL_TYPES.values()) <= set(FAMILIES)


@pytest.mark.parametrize(
    ("where", "configs", "expected"),
    [
        ("google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", {}, 82),
        ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt", {}, 50),
        ("google/gemma-scope-2-1b-pt/resid_post/layer_7_width_16k_l0_small", {}, None),
        ("/home/me/runs_l0_5/layer_12/average_l0_82", {}, 82),
        ("a/b", {"cfg.json": {"metadata": {"l0": 41.5}}}, 41.5),
        ("a/b", {"cfg.json": {"l0": 7}}, 7),
        ("a/b", {"cfg.json": {"metadata": {"l0": None}}, "other.json": {"metadata": 3}}, None),
        ("a/b", {"cfg.json": {"l0": True}}, None),
    ],
)
def test_the_l0_it_states(where: str, configs: dict[str, dict[str, object]], expected: float | None) -> None:
    assert stated_l0(where, configs) == expected

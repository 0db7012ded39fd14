"""The local replacement model: rows that add up, and edges that are effects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dictlearn import attach
from dictlearn.circuits.graphs.local import LocalModel, Targets
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from tests.circuits.graphs_setup import N_LAYERS, cross_layer, some_ids, transcoders
from tests.circuits.setup import filled, tiny_model

FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox")
MAKERS = {
    "transcoders": transcoders,
    "cross_layer": cross_layer,
    "skip": lambda model: cross_layer(model, skip=True),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    return tiny_model(tmp_path, request.param, n_layers=N_LAYERS)


@pytest.fixture(params=MAKERS)
def dictionaries(request: pytest.FixtureRequest, model: PreTrainedModel) -> dict[str, Dictionary]:
    return MAKERS[request.param](model)


def _all_targets(local: LocalModel) -> list[Targets]:
    of_latents = [own for _, own in local.latent_targets(torch.arange(local.n_latents))]
    return [*of_latents, local.logit_targets(torch.tensor([3, 50, 96]))]


@pytest.mark.parametrize("n_special", [0, 1])
def test_rows_add_up(model: PreTrainedModel, dictionaries: dict[str, Dictionary], n_special: int) -> None:
    local = LocalModel(model, dictionaries, some_ids(), n_special)
    for targets in _all_targets(local):
        total = local.total(targets)
        row = local.edges(targets).sum(-1) + local.bias(targets)
        torch.testing.assert_close(row, total, atol=1e-9, rtol=1e-9)
        assert total.abs().max() > 0.1


def test_dictionaries_of_unequal_sizes(tmp_path: Path) -> None:
    """Positions without a latent at one layer have none of another layer's numbers."""
    model, made = tiny_model(tmp_path, "gpt2", n_layers=N_LAYERS), {}
    for layer, (n, sparsifier) in enumerate([(64, TopK(k=1)), (8, ReLU(l1=0.0)), (4, ReLU(l1=0.0))]):
        own = Linear(16, 16, n, sparsifier, [f"mlp_in.{layer}"], [f"mlp_out.{layer}"])
        made[f"mlp.{layer}"] = filled(own, layer + 5)
    local = LocalModel(model, made, some_ids())
    assert local.active.latent[0] >= 8
    assert len(set(local.active.position[local.active.layer == 1].bincount().tolist())) > 1
    for targets in _all_targets(local):
        row = local.edges(targets).sum(-1) + local.bias(targets)
        torch.testing.assert_close(row, local.total(targets), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("n_special", [0, 1])
def test_errors_are_what_dictionaries_leave_over(
    model: PreTrainedModel, dictionaries: dict[str, Dictionary], n_special: int
) -> None:
    ids = some_ids()
    errors = LocalModel(model, dictionaries, ids, n_special).errors
    with torch.no_grad(), attach(model, dictionaries) as run:
        run(ids)
    found = [run.errors[name][0] for name in dictionaries]
    expected = found[0].movedim(-2, 0) if len(found) == 1 else torch.stack(found)  # [n_layers, ctx, d]
    torch.testing.assert_close(errors[:, n_special:], expected[:, n_special:], atol=1e-5, rtol=1e-5)
    assert not errors[:, :n_special].any()


def test_targets_are_pre_activations_and_demeaned_logits(
    model: PreTrainedModel, dictionaries: dict[str, Dictionary]
) -> None:
    ids = some_ids()
    local = LocalModel(model, dictionaries, ids)
    places, *_ = zip(*local.latent_targets(torch.arange(local.n_latents)), strict=True)
    assert torch.cat(places).sort().values.tolist() == list(range(local.n_latents))
    with torch.no_grad(), attach(model, dictionaries) as run:
        logits = run(ids).logits[0, -1]
    for own, targets in local.latent_targets(torch.arange(local.n_latents)):
        _, position, latent, value = (part[own] for part in local.active)
        name = f"mlp.{targets.layer}" if len(dictionaries) > 1 else "clt"
        torch.testing.assert_close(run.latents[name][0, position, latent], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(local.total(targets), value, atol=1e-5, rtol=1e-4)  # of ReLU, TopK, JumpReLU
    if model.config.model_type != "gemma2":  # whose logits have a softcap
        tokens = torch.tensor([3, 50, 96])
        found = local.total(local.logit_targets(tokens))
        torch.testing.assert_close(found, (logits - logits.mean())[tokens], atol=1e-5, rtol=1e-5)


def test_logits_of_a_head_with_a_bias(tmp_path: Path) -> None:
    model, ids = tiny_model(tmp_path, "phi", n_layers=N_LAYERS), some_ids()
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    local, tokens = LocalModel(model, cross_layer(model), ids), torch.tensor([3, 50, 96])
    found = local.total(local.logit_targets(tokens))
    torch.testing.assert_close(found, (logits - logits.mean())[tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi", "opt", "olmo2", "mistral", "phi3"])
def test_rows_add_up_in_other_families(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path, family, n_layers=N_LAYERS)
    local = LocalModel(model, cross_layer(model), some_ids(), 1)
    for targets in _all_targets(local):
        row = local.edges(targets).sum(-1) + local.bias(targets)
        torch.testing.assert_close(row, local.total(targets), atol=1e-9, rtol=1e-9)

"""The block `ground_truth`: true, permuted, shrunk and half dictionaries have the numbers of their closed form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from dictlearn.data import Planted
from dictlearn.data.planted import PlantedModel
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.evaluation import EvaluationContext, evaluate
from dictlearn.evaluation.behaviour import Behaviour
from dictlearn.evaluation.ground_truth import GroundTruth
from dictlearn.evaluation.reconstruction import Reconstruction
from dictlearn.evaluation.table import report_table
from dictlearn.lm.load import LM
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.relu import ReLU
from tests.evaluation.conftest import autoencoder, context_of, flat

N_FEATURES = 24
# d_i . x = f_i of orthonormal directions, so relu(d_i . x) is the true code
ORTHONORMAL = Planted(d=32, n_features=N_FEATURES, l0=3.0, min_rate=0.02, offset=1.0)


def true_dictionary(planted: Planted, rows: Tensor | None = None, scale: float = 1.0) -> Linear:
    """Latents relu(d_i . (x - offset)), written as `scale` d_i."""
    model = planted.own_lm().model
    assert isinstance(model, PlantedModel)
    directions = model.directions if rows is None else model.directions[rows]
    offset = model.planted.bias
    sae = Linear(planted.d, planted.d, len(directions), ReLU(l1=0.0), reads=("planted",), writes=("planted",))
    with torch.no_grad():
        sae.W_enc.copy_(directions.T)
        sae.b_enc.copy_(-directions @ offset - 1e-3)  # rounding is no firing
        sae.W_dec.copy_(scale * directions)
        sae.b_dec.copy_(offset)
    return sae.requires_grad_(False)


def planted_context(
    planted: Planted, dictionaries: Mapping[str, Dictionary], n_tokens: int = 6_000, batch_rows: int = 16
) -> EvaluationContext:
    lm = planted.own_lm()
    rows = planted.heldout(lm.tokenizer, n_tokens)
    return EvaluationContext(lm, dictionaries, rows.tokens, rows.mask, rows.info, batch_rows)


def ground_truth(planted: Planted, dictionary: Dictionary, **options: int) -> dict[str, Any]:
    return GroundTruth().run(planted_context(planted, {"a": dictionary}, **options))["a"]["ground_truth"]


@pytest.mark.parametrize(
    "order", [torch.arange(N_FEATURES), torch.arange(N_FEATURES).flip(0)], ids=["true", "permuted"]
)
def test_the_true_dictionary_is_perfect(order: Tensor) -> None:
    found = ground_truth(ORTHONORMAL, true_dictionary(ORTHONORMAL, order))
    for key in ("frac_matched", "precision", "recall", "f1", "mean_cosine", "mean_max_cosine"):
        assert found[key] == pytest.approx(1, abs=2e-3), key
    assert found["shrinkage"] == pytest.approx(1, abs=5e-3)
    assert found["fvu"] == pytest.approx(0, abs=1e-5)
    assert found["fvu_of_truth"] == pytest.approx(0, abs=1e-10)
    assert found["l0"] == pytest.approx(found["true_l0"], rel=2e-3)
    assert found["frac_dead"] == found["n_duplicates"] == 0
    assert "levels" not in found


def test_a_crosscoder_of_the_one_site_is_that_dictionary() -> None:
    sae = true_dictionary(ORTHONORMAL)
    crosscoder = Crosscoder(32, 32, N_FEATURES, ReLU(l1=0.0), reads=("planted",), writes=("planted",))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            crosscoder.get_parameter(name).view(parameter.shape).copy_(parameter)
    found, expected = (ground_truth(ORTHONORMAL, each) for each in (crosscoder, sae))
    assert found == pytest.approx(expected)


def test_a_shrunk_dictionary_gives_the_factor() -> None:
    found = ground_truth(ORTHONORMAL, true_dictionary(ORTHONORMAL, scale=0.6))
    assert found["shrinkage"] == pytest.approx(0.6, rel=5e-3)
    assert found["frac_matched"] == 1
    assert found["recall"] == pytest.approx(1, abs=2e-3)


def test_half_of_the_features_give_one_half() -> None:
    half = true_dictionary(ORTHONORMAL, torch.arange(0, N_FEATURES, 2))
    found = ground_truth(ORTHONORMAL, half)
    assert found["frac_matched"] == 0.5
    assert found["mean_cosine"] == pytest.approx(0.5)
    assert found["recall"] == pytest.approx(0.5, abs=2e-3)
    assert found["f1"] == pytest.approx(0.5, abs=2e-3)
    assert found["precision"] == pytest.approx(1, abs=2e-3)  # of the latents that there are
    assert found["n_latents"] == N_FEATURES // 2


def test_a_code_with_signs_may_have_features_backwards() -> None:
    sae = true_dictionary(ORTHONORMAL)
    backwards = Linear(32, 32, N_FEATURES, AbsTopK(k=N_FEATURES), reads=("planted",), writes=("planted",))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            backwards.get_parameter(name).copy_(-parameter if name.startswith("W_") else parameter)
        backwards.b_enc.zero_()
        backwards.b_dec.zero_()
    planted = Planted(d=32, n_features=N_FEATURES, l0=3.0, min_rate=0.02)
    found = ground_truth(planted, backwards)
    assert found["frac_matched"] == 1
    assert found["recall"] == pytest.approx(1, abs=2e-3)
    assert found["shrinkage"] == pytest.approx(1, abs=1e-3)


def test_noise_is_the_floor_of_fvu() -> None:
    noisy = Planted(d=32, n_features=N_FEATURES, l0=3.0, min_rate=0.02, noise=0.5)
    context = planted_context(noisy, {"a": true_dictionary(noisy)})
    sections = {**GroundTruth().run(context)["a"], **Reconstruction().run(context)["a"]}
    rates, sizes = noisy.features.firing.rates, 1 + 0.25**2
    variance = (rates * sizes - (rates * 1.0) ** 2).sum() + 0.25
    assert sections["ground_truth"]["fvu_of_truth"] == pytest.approx(0.25 / variance, rel=0.03)
    assert sections["ground_truth"]["fvu"] == pytest.approx(sections["reconstruction"]["fvu"])
    assert sections["ground_truth"]["l0"] == pytest.approx(sections["sparsity"]["l0"]["mean"])
    assert sections["ground_truth"]["precision"] < 0.5  # a latent fires at noise


def test_the_batch_size_does_not_matter() -> None:
    planted = Planted(d=16, n_features=40, l0=4.0, min_rate=0.01, depth=1, noise=0.2, n_duplicates=2)
    sae = true_dictionary(planted, torch.arange(30))
    few, many = (ground_truth(planted, sae, batch_rows=rows) for rows in (3, 40))
    assert flat(few) == pytest.approx(flat(many), rel=1e-6, nan_ok=True)


def test_levels_of_a_hierarchy_are_told_apart() -> None:
    planted = Planted(d=64, n_features=30, l0=4.0, min_rate=0.01, depth=1, branching=4)
    found = ground_truth(planted, true_dictionary(planted, torch.arange(6)))
    assert [level["n_features"] for level in found["levels"]] == [6, 24]
    assert [level["frac_matched"] for level in found["levels"]] == [1, 0]
    assert found["frac_matched"] == pytest.approx(6 / 30)
    assert found["levels"][1]["shrinkage"] is None
    sections = GroundTruth().run(planted_context(planted, {"a": true_dictionary(planted, torch.arange(6))}))["a"]
    assert sections["warnings"] == [
        "ground_truth.shrinkage is null: no feature is matched (cosine of 0.95 or more) at level 1"
    ]


def test_an_absorbed_parent_loses_recall() -> None:
    """A latent that is silent where a child fires, the child's latent having the parent's direction in it."""
    planted = Planted(d=64, n_features=10, l0=2.0, min_rate=0.01, depth=1, branching=4, child_rate=0.3)
    sae = true_dictionary(planted)
    with torch.no_grad():
        children = sae.W_enc[:, 2:].clone()
        for parent in range(2):
            own = children[:, 4 * parent : 4 * parent + 4]
            sae.W_enc[:, parent] -= 100 * own.sum(1)
    found = ground_truth(planted, sae)
    parents, kids = found["levels"]
    assert parents["precision"] == pytest.approx(1, abs=1e-2)
    assert parents["recall"] == pytest.approx(0.7**4, abs=0.03)  # no child fires
    assert kids["recall"] == pytest.approx(1, abs=1e-2)


def test_duplicates_are_counted_and_only_one_is_matched_by_one_latent() -> None:
    planted = Planted(d=32, n_features=20, l0=3.0, min_rate=0.02, n_duplicates=4)
    found = ground_truth(planted, true_dictionary(planted, torch.arange(16)))
    assert found["n_duplicates"] == 8
    assert found["frac_matched"] == pytest.approx(16 / 20)
    assert found["mean_max_cosine"] == pytest.approx(1, abs=1e-3)


def test_report_table_and_features(tmp_path: Path) -> None:
    context = planted_context(ORTHONORMAL, {"a": true_dictionary(ORTHONORMAL)})
    blocks = {"truth": GroundTruth(), "behaviour": Behaviour(n_tokens=100)}
    results = evaluate(context, blocks, {"a": tmp_path})
    assert results.errors == []
    assert results.reports["a"]["warnings"] == [
        "behaviour is left out: planted activations come without a language model"
    ]
    table = report_table(results.reports)
    headers = [str(column.header) for column in table.columns]
    assert "features\nmatched" in headers
    assert "KL" not in headers
    features = pd.read_parquet(tmp_path / "features.parquet")
    assert features.feature.tolist() == features.latent.tolist() == list(range(N_FEATURES))
    assert features.parent.isna().all()
    assert features["count"].sum() == results.reports["a"]["ground_truth"]["true_l0"] * 6_016
    assert (features.nearest_cosine < 1e-3).all()


def test_a_language_model_has_no_ground_truth(lm: LM, tokens: Tensor) -> None:
    assert GroundTruth().run(context_of(lm, tokens, {"a": autoencoder()})) == {}

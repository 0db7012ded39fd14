"""Matching and detection against closed forms and a slow count."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dictlearn.metrics.ground_truth import Detection, match

D = 12


def rows(n: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_permuted_dictionary_is_matched_whatever_its_norms() -> None:
    features = rows(20)
    order = torch.randperm(20)
    found = match(features, 3.7 * features[order])
    assert torch.equal(order[found.latent], torch.arange(20))
    torch.testing.assert_close(found.cosine, torch.ones(20, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(found.sign, torch.ones(20, dtype=torch.float64))


def test_the_assignment_has_the_largest_total_cosine() -> None:
    features, latents = rows(5), rows(6, seed=1)
    found = match(features, latents)
    cosines = (features @ latents.T).double()
    best = max(sum(cosines[i, p] for i, p in enumerate(chosen)) for chosen in itertools.permutations(range(6), 5))
    assert found.cosine.sum().item() == pytest.approx(float(best), abs=1e-5)
    assert len(set(found.latent.tolist())) == 5
    torch.testing.assert_close(found.max_cosine, cosines.max(1).values, atol=1e-6, rtol=0)


def test_features_without_a_latent() -> None:
    features = rows(8)
    found = match(features, features[:3])
    assert found.latent.tolist() == [0, 1, 2, *[-1] * 5]
    assert found.cosine[3:].tolist() == found.sign[3:].tolist() == [0] * 5
    assert bool((found.max_cosine[3:] > 0).any())
    zero = match(features, torch.zeros(9, D))
    assert zero.cosine.tolist() == [0] * 8


def test_only_signed_latents_have_two_directions() -> None:
    features = torch.eye(D)[:6]
    latents = features * torch.tensor([1, -1, 1, -1, 1, -1]).unsqueeze(1)
    signed = match(features, latents, signed=True)
    assert signed.latent.tolist() == list(range(6))
    assert signed.sign.tolist() == [1, -1, 1, -1, 1, -1]
    assert signed.cosine.tolist() == [1] * 6
    unsigned = match(features, latents)
    assert unsigned.cosine.tolist() == [1, 0, 1, 0, 1, 0]


def values(n: int, n_features: int, rate: float, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n, n_features, generator=make)
    return torch.where(torch.rand(n, n_features, generator=make) < rate, drawn + 0.1, 0.0)


def test_detection_against_a_slow_count() -> None:
    true, found = values(500, 7, 0.2, 0), values(500, 7, 0.3, 1)
    metric = Detection(7)
    for part in range(0, 500, 130):
        metric.update(true[part : part + 130], found[part : part + 130])
    result = {name: value.tolist() for name, value in metric.compute().items()}
    for feature in range(7):
        pairs = list(zip(true[:, feature].tolist(), found[:, feature].tolist(), strict=True))
        both = [f / t for t, f in pairs if t and f]
        precision = len(both) / sum(1 for _, f in pairs if f)
        recall = len(both) / sum(1 for t, _ in pairs if t)
        assert result["precision"][feature] == pytest.approx(precision)
        assert result["recall"][feature] == pytest.approx(recall)
        assert result["f1"][feature] == pytest.approx(2 / (1 / precision + 1 / recall))
        assert result["shrinkage"][feature] == pytest.approx(sum(both) / len(both))
    assert float(metric.true_l0) == pytest.approx((true > 0).sum().item() / 500)


def test_what_has_no_denominator_is_nan() -> None:
    metric = Detection(3)
    metric.update(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    result = metric.compute()
    assert result["precision"].isnan().tolist() == [True, False, True]
    assert result["recall"].isnan().tolist() == [False, True, True]
    assert result["f1"].isnan().tolist() == [False, False, True]
    assert result["shrinkage"].isnan().tolist() == [True] * 3


def test_negative_values_do_not_count_as_firing() -> None:
    metric = Detection(1)
    metric.update(torch.ones(2, 1), torch.tensor([[-1.0], [1.0]]))
    assert metric.by_feature["recall"].tolist() == [0.5]

"""Planted activations against the formulas of their features."""

from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import Tensor

from dictlearn.data import ActivationData, Planted
from dictlearn.data.features import Forest, directions, near_orthogonal, zipf
from dictlearn.data.planted import FEATURE_VALUES, SITE
from dictlearn.lm import activations
from dictlearn.types import DictlearnError

N = 100_000
SMALL = {"d": 16, "n_features": 40, "l0": 4.0, "min_rate": 0.005}


def drawn(n_tokens: int = N, **changes: Any) -> tuple[Planted, Tensor, Tensor]:
    """Planted data, its activations [n, d] and its feature values [n, n_features]."""
    planted = Planted(**{**SMALL, **changes})
    assert planted.problems() == []
    lm = planted.own_lm()
    rows = planted.heldout(lm.tokenizer, n_tokens).tokens
    acts = activations(lm.model, [SITE, FEATURE_VALUES], rows)
    return planted, acts["planted"].flatten(0, 1), acts["planted:in"].flatten(0, 1)


def batches(batch_size: int, n_tokens: int = 4_000, **changes: Any) -> ActivationData:
    planted = Planted(**{**SMALL, **changes})
    return ActivationData(planted, planted.own_lm(), [SITE], batch_size, n_tokens)


def acts_of(stream: Any) -> Iterator[Tensor]:
    return (batch.acts["planted"] for batch in stream)


def test_activations_are_the_sum_of_their_features() -> None:
    planted, x, values = drawn(2_000, offset=3.0)
    rows = torch.from_numpy(planted.features.directions).float()
    constant = x - values @ rows
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), atol=1e-5, rtol=0)
    assert constant[0].norm().item() == pytest.approx(3.0, rel=1e-5)


def test_noise_has_the_norm_that_is_asked_for() -> None:
    planted, x, values = drawn(20_000, noise=0.3)
    noise = x - values @ torch.from_numpy(planted.features.directions).float()
    assert noise.square().sum(-1).mean().sqrt().item() == pytest.approx(0.3, rel=0.01)
    covariance = noise.T @ noise / len(noise) * 16 / 0.3**2
    torch.testing.assert_close(covariance, torch.eye(16), atol=0.05, rtol=0)


def test_rates_are_zipf_and_sum_to_l0() -> None:
    rates = zipf(1000, total=10.0, exponent=1.0, least=0.002)
    assert rates.sum() == pytest.approx(10)
    free = (rates > 0.002) & (rates < 0.5)
    scaled = rates * np.arange(1, 1001)
    assert free.sum() > 500
    np.testing.assert_allclose(scaled[free], scaled[free][0])
    assert rates.min() == 0.002
    np.testing.assert_allclose(zipf(50, total=5.0, exponent=0.0, least=0.01), 0.1)
    with pytest.raises(DictlearnError, match=r"cannot sum to 30 .*0.5 at least and 25 at most"):
        zipf(50, total=30.0, exponent=1.0, least=0.01)
    with pytest.raises(DictlearnError, match=r"data.zipf_exponent must be smaller: 1 / 256\^200"):
        zipf(256, total=12.0, exponent=200.0, least=0.001)


def within(found: np.ndarray, share: np.ndarray, n: int) -> None:
    """Counts of independent events: 5 standard deviations of the binomial."""
    np.testing.assert_array_less(np.abs(found - share), 5 * np.sqrt(share * (1 - share) / n))


@pytest.mark.parametrize("changes", [{}, {"firing_correlation": 0.6, "firing_rank": 2}])
def test_features_fire_at_their_rates(changes: dict[str, Any]) -> None:
    planted, _, values = drawn(**changes)
    rates = planted.features.firing.rates
    assert rates.sum() == pytest.approx(4)
    within((values > 0).double().mean(0).numpy(), rates, len(values))


def test_independent_features_fire_independently() -> None:
    planted, _, values = drawn()
    fires = (values > 0).double().numpy()
    rates = planted.features.firing.rates
    pairs = list(combinations(range(10), 2))
    together = np.array([(fires[:, i] * fires[:, j]).mean() for i, j in pairs])
    within(together, np.array([rates[i] * rates[j] for i, j in pairs]), len(fires))


def test_correlated_features_fire_as_the_copula_says() -> None:
    planted, _, values = drawn(firing_correlation=0.7, firing_rank=1, zipf_exponent=0.0)
    firing = planted.features.firing
    assert firing.loadings is not None
    np.testing.assert_allclose(np.square(firing.loadings).sum(1), 0.7)
    fires = (values > 0).double().numpy()
    for i, j in combinations(range(5), 2):
        correlation = float(firing.loadings[i] @ firing.loadings[j])
        assert abs(correlation) == pytest.approx(0.7)  # of rank 1: together, or apart
        limits = norm.ppf(firing.rates[[i, j]])
        covariance: Any = [[1, correlation], [correlation, 1]]
        together = multivariate_normal([0, 0], covariance).cdf(limits)
        within(np.array([(fires[:, i] * fires[:, j]).mean()]), np.array([together]), len(fires))


def test_children_fire_with_their_parents_alone() -> None:
    planted, _, values = drawn(n_features=42, l0=2.0, depth=2, branching=4, child_rate=0.3, firing_correlation=0.5)
    forest, rates = planted.features.firing.forest, planted.features.firing.rates
    assert forest.levels.tolist() == [0] * 2 + [1] * 8 + [2] * 32
    assert [np.count_nonzero(forest.parents == parent) for parent in range(42)] == [4] * 10 + [0] * 32
    assert set(forest.parents[2:10]) == {0, 1}
    assert set(forest.parents[10:]) == set(range(2, 10))
    fires = (values > 0).numpy()
    for child in range(2, 42):
        assert not fires[~fires[:, forest.parents[child]], child].any()
        n_parent = fires[:, forest.parents[child]].sum()
        within(np.array([fires[:, child].sum() / n_parent]), np.array([0.3]), n_parent)
    assert rates.sum() == pytest.approx(2)
    assert rates[10:].min() >= 0.005
    with pytest.raises(DictlearnError, match="multiple of 21, the size of a tree"):
        Forest.of(40, depth=2, branching=4)


def test_magnitudes_have_their_distributions() -> None:
    _, _, values = drawn(magnitude_sd=0.8)
    sizes = values[values > 0].double()
    folded = 0.8 * np.sqrt(2 / np.pi) * np.exp(-1 / (2 * 0.64)) + 1 - 2 * norm.cdf(-1 / 0.8)
    assert sizes.mean().item() == pytest.approx(folded, rel=0.01)
    assert sizes.square().mean().item() == pytest.approx(1 + 0.64, rel=0.01)  # of |z| as of z
    _, _, values = drawn(magnitude="exponential", magnitude_sd=0.5)
    sizes = values[values > 0].double()
    assert sizes.min() >= 1
    assert [sizes.mean().item(), sizes.std().item()] == pytest.approx([1.5, 0.5], rel=0.02)


def largest_cosine(rows: np.ndarray) -> float:
    cosines = np.abs(rows @ rows.T)
    np.fill_diagonal(cosines, 0)
    return cosines.max()


def test_near_orthogonal_directions() -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal((128, 32))
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    rows = near_orthogonal(start)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    welch = np.sqrt((128 - 32) / (32 * 127))
    assert welch < largest_cosine(rows) < 1.35 * welch < 0.5 * largest_cosine(start)
    square = near_orthogonal(start[:32])
    np.testing.assert_allclose(square @ square.T, np.eye(32), atol=1e-12)


def test_correlated_directions_share_one_direction_a_group() -> None:
    rng = np.random.default_rng(0)
    rows = directions(rng, 30, 64, optimised=True, cosine=0.4, n_groups=3)  # u_i orthonormal: exact cosines
    same = np.arange(30)[:, None] % 3 == np.arange(30) % 3
    np.testing.assert_allclose(rows @ rows.T, np.where(same, 0.4, 0) + 0.6 * np.eye(30), atol=1e-12)
    loose = directions(rng, 200, 64, optimised=False, cosine=0.4)
    cosines = (loose @ loose.T)[np.triu_indices(200, 1)]
    assert cosines.mean() == pytest.approx(0.4, abs=0.01)
    assert cosines.std() == pytest.approx(0.6 / 63**0.5, rel=0.1)


def test_the_last_features_may_be_duplicates() -> None:
    rows = Planted(**SMALL, n_duplicates=3).features.directions
    np.testing.assert_array_equal(rows[-3:], rows[:3])
    assert largest_cosine(rows[:-3]) < 0.5


def test_rows_depend_on_the_seed_and_their_number_alone() -> None:
    planted = Planted(**SMALL, noise=0.1)
    tokenizer = planted.own_lm().tokenizer
    rows = planted.train(tokenizer).rows(0, 20)
    heldout = planted.heldout(tokenizer, 2_560).tokens
    x = activations(planted.own_lm().model, [SITE], rows)["planted"]
    again = activations(Planted(**SMALL, noise=0.1).own_lm().model, [SITE], rows[[7, 3]])["planted"]
    assert torch.equal(again, x[[7, 3]])
    other = activations(Planted(**SMALL, noise=0.1, seed=1).own_lm().model, [SITE], rows)["planted"]
    unseen = activations(planted.own_lm().model, [SITE], heldout)["planted"]
    everything = torch.cat([x, other, unseen]).flatten(0, 1)
    assert len(everything.unique(dim=0)) == len(everything) == 3 * 2_560


def test_the_batch_size_does_not_change_the_activations() -> None:
    small = torch.cat([*acts_of(batches(100, noise=0.1).train_dataloader())])
    large = torch.cat([*acts_of(batches(1_000, noise=0.1).train_dataloader())])
    assert torch.equal(small, large)
    assert len(small.unique(dim=0)) == 4_000


def test_a_stream_goes_on_where_it_was() -> None:
    whole = list(acts_of(batches(300).train_dataloader()))
    first = batches(300).train_dataloader()
    head = list(islice(acts_of(first), 5))
    second = batches(300).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([*head, *acts_of(second)]), torch.cat(whole))
    with pytest.raises(DictlearnError, match="A stream continues with"):
        batches(300, noise=0.1).train_dataloader().load_state_dict(first.state_dict())


def test_statistics_are_those_of_the_formula() -> None:
    """Of orthonormal directions that fire independently: mean and variance in closed form."""
    data = batches(256, d=40, n_features=40, magnitude_sd=0.0, offset=0.0)
    found = data.statistics(60_000)["planted"]
    features = data.text.features  # type: ignore[attr-defined]
    rates = features.firing.rates
    np.testing.assert_allclose(found.mean.numpy(), rates @ features.directions, atol=0.01)
    assert found.variance == pytest.approx((rates * (1 - rates)).sum(), rel=0.02)
    assert found.n_tokens >= 60_000


def test_what_is_wrong_is_said_of_every_value() -> None:
    wrong = {
        "d": 1,
        "l0": 0.0,
        "magnitude": "x",
        "directions": "y",
        "firing_correlation": 1.0,
        "child_rate": 0.0,
        "noise": -1.0,
    }
    assert len(Planted(**wrong).problems()) == len(wrong)
    for changes, rule in [
        ({"n_duplicates": 21}, "at most half of data.n_features = 40, got 21"),
        ({"direction_cosine": 0.5, "direction_groups": 15}, "must leave two dimensions of data.d = 16, got 15"),
        ({"n_features": 5_000, "min_rate": 1e-4}, "near_orthogonal is for at most 4096 features, got 5000"),
        ({"depth": 1}, None),
        ({"depth": 2}, "multiple of 21"),
        ({"l0": 30.0}, "cannot sum to 30"),
    ]:
        problems = Planted(**{**SMALL, **changes}).problems()
        assert len(problems) == (0 if rule is None else 1)
        assert rule is None or rule in problems[0]
    with pytest.raises(DictlearnError, match="stream=sequences is for text"):
        ActivationData(Planted(**SMALL), Planted(**SMALL).own_lm(), [SITE], 64, 64, stream="sequences")

"""Ratios of sums over tokens: values, positions, and standard errors against simulation and hand formulas."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dictlearn.metrics.ratio import Places, TokenRatio, clustered_stderr

N_ROWS, CTX = 40, 9


def tokens(n_rows: int = N_ROWS) -> tuple[Places, Tensor, Tensor]:
    """About half of the tokens of some rows, with values that agree within a row."""
    counted = torch.rand(n_rows, CTX) < 0.5
    counted[3] = False  # a row without tokens
    rows, positions = counted.nonzero(as_tuple=True)
    top = (torch.randn(n_rows, 2)[rows] + 0.1 * torch.randn(len(rows), 2)).double()
    return Places(rows, positions), top, torch.rand(len(rows), 2).double() + 0.5


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_against_numpy(batch: int, scale: float) -> None:
    places, top, bottom = tokens()
    top = scale * top
    metric = TokenRatio(N_ROWS, CTX, 2)
    for part in torch.randperm(len(top)).split(batch):
        metric.update(places.select(part), top[part], bottom[part])
    a, b = top.numpy(), bottom.numpy()
    rows, positions = (index.numpy() for index in places)
    ratio = a.sum(0) / b.sum(0)
    np.testing.assert_allclose(metric.ratio.numpy(), ratio, rtol=1e-12)
    by_position = [a[positions == p].sum(0) / b[positions == p].sum(0) for p in range(CTX)]
    np.testing.assert_allclose(metric.by_position.numpy(), by_position, rtol=1e-12)
    rows_seen = np.unique(rows)
    residuals = np.array([(a - ratio * b)[rows == row].sum(0) for row in rows_seen])
    g = len(rows_seen)
    assert metric.n_rows_seen == g < N_ROWS
    expected = np.sqrt(g / (g - 1) * (residuals**2).sum(0)) / b.sum(0)
    np.testing.assert_allclose(metric.stderr.numpy(), expected, rtol=1e-10)


def test_one_token_a_row_is_the_textbook_standard_error() -> None:
    values = torch.randn(50, 1, dtype=torch.float64)
    metric = TokenRatio(50, 4)
    metric.update(Places(torch.arange(50), torch.zeros(50, dtype=torch.int64)), values)
    assert metric.stderr.item() == pytest.approx((values.std() / 50**0.5).item(), rel=1e-12)
    assert metric.by_position[0].item() == pytest.approx(values.mean().item())
    assert metric.by_position[1:].isnan().all()


def test_it_is_the_spread_of_the_ratio_over_draws_of_rows() -> None:
    """Not that of independent tokens, which is much smaller here."""
    ratios, stderrs, naive = [], [], []
    for _ in range(300):
        places, top, bottom = tokens()
        metric = TokenRatio(N_ROWS, CTX, 2)
        metric.update(places, top, bottom)
        ratios.append(metric.ratio)
        stderrs.append(metric.stderr)
        naive.append((top - metric.ratio * bottom).std(0) * len(top) ** 0.5 / bottom.sum(0))
    spread = torch.stack(ratios).std(0)
    assert torch.stack(stderrs).mean(0).tolist() == pytest.approx(spread.tolist(), rel=0.12)
    assert (torch.stack(naive).mean(0) < 0.6 * spread).all()


def test_paired_differences_and_means_of_ratios() -> None:
    """Influences add up: the difference of two means has the standard error of the mean difference."""
    places, top, _ = tokens()
    one, two, difference, mean = (TokenRatio(N_ROWS, CTX) for _ in range(4))
    one.update(places, top[:, :1])
    two.update(places, top[:, 1:])
    difference.update(places, top[:, :1] - top[:, 1:])
    mean.update(places, top.mean(1, keepdim=True))
    for influence, expected in (
        (one.influence - two.influence, difference.stderr),
        ((one.influence + two.influence) / 2, mean.stderr),
    ):
        got = clustered_stderr(influence, one.n_rows_seen)
        assert got.item() == pytest.approx(expected.item(), rel=1e-10)


def test_one_row_has_no_standard_error_and_nothing_no_ratio() -> None:
    metric = TokenRatio(5, 3)
    assert math.isnan(metric.compute())
    metric.update(Places(torch.tensor([2, 2]), torch.tensor([0, 1])), torch.ones(2, 1))
    assert metric.ratio.item() == 1
    assert metric.stderr.isnan().all()


def test_ranks_add_up() -> None:
    places, top, bottom = tokens()
    one, two, whole = (TokenRatio(N_ROWS, CTX, 2) for _ in range(3))
    one.update(places.select(slice(0, 50)), top[:50], bottom[:50])
    two.update(places.select(slice(50, None)), top[50:], bottom[50:])
    whole.update(places, top, bottom)
    one.merge_state(two)
    torch.testing.assert_close(one.ratio, whole.ratio)
    torch.testing.assert_close(one.stderr, whole.stderr)

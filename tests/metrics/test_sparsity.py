"""L0 and firing counts against numpy and planted data."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dictlearn.metrics.sparsity import L0, FiringCounts, LatentValues, n_active
from dictlearn.types import SparseLatents

N_LATENTS = 40


def random_latents(n_tokens: int, rate: float = 0.2) -> Tensor:
    active = torch.rand(n_tokens, N_LATENTS) < rate * torch.rand(n_tokens, 1)  # right-skewed L0
    return active * torch.randn(n_tokens, N_LATENTS)


def forms(latents: Tensor) -> list[Tensor | SparseLatents]:
    return [latents, SparseLatents.from_dense(latents)]


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 20, 1001])
def test_l0_is_what_numpy_says(n_tokens: int) -> None:
    latents = random_latents(n_tokens)
    counts = np.count_nonzero(latents.numpy(), axis=1)
    expected = {"mean": counts.mean(), "median": np.median(counts)}
    expected |= {"p5": np.quantile(counts, 0.05), "p95": np.quantile(counts, 0.95)}
    for form in forms(latents):
        metric = L0(N_LATENTS)
        metric.update(form)
        got = {name: value.item() for name, value in metric.compute().items()}
        assert got == pytest.approx(expected, abs=1e-12)


def test_counts_in_batches_are_those_of_the_whole() -> None:
    latents = random_latents(500)
    l0, firing = L0(N_LATENTS), FiringCounts(N_LATENTS)
    for part in latents[torch.randperm(500)].split(33):
        l0.update(SparseLatents.from_dense(part))
        firing.update(part)
    assert l0.n_tokens_with.tolist() == np.bincount((latents != 0).sum(1), minlength=N_LATENTS + 1).tolist()
    assert firing.n_fired.tolist() == (latents != 0).sum(0).tolist()
    assert firing.n_tokens == 500


def test_a_stored_zero_is_not_active() -> None:
    """TopK keeps k latents of every token; those that the ReLU zeroed do not count, negative values do."""
    latents = SparseLatents(
        values=torch.tensor([2.0, 0.0, 0.0, 0.0, -1.0, 3.0]),
        indices=torch.tensor([4, 1, 0, 2, 4, 5]),
        offsets=torch.tensor([0, 2, 4, 6]),
        n_latents=6,
    )
    l0, firing = L0(6), FiringCounts(6)
    l0.update(latents)
    firing.update(latents)
    assert l0.compute()["mean"] == 1.0  # 1, 0 and 2 active
    assert firing.n_fired.tolist() == [0, 0, 0, 0, 2, 1]
    assert firing.compute()["n_dead"] == 4
    assert firing.compute()["frac_dead"] == pytest.approx(4 / 6)


def test_tokens_without_latents() -> None:
    latents = SparseLatents(torch.ones(1), torch.tensor([3]), torch.tensor([0, 0, 1, 1]), n_latents=6)
    l0, firing = L0(6), FiringCounts(6)
    l0.update(latents)
    firing.update(latents)
    assert l0.n_tokens_with.tolist() == [2, 1, 0, 0, 0, 0, 0]
    assert firing.n_tokens == 3


def test_nothing_seen_is_not_a_number() -> None:
    metric = L0(4)
    metric.update(torch.zeros(0, 4))
    assert all(math.isnan(value) for value in metric.compute().values())


@pytest.mark.parametrize("start", [2**24, 2**53])
def test_counters_are_exact_past_what_a_float_counts(start: int) -> None:
    l0, firing = L0(3), FiringCounts(3)
    l0.n_tokens_with[1] = start
    firing.n_fired[0] = start
    firing.n_tokens += start
    for _ in range(3):
        for form in forms(torch.tensor([[1.0, 0.0, 0.0]])):
            l0.update(form)
            firing.update(form)
    assert l0.n_tokens_with.tolist() == [0, start + 6, 0, 0]
    assert firing.n_fired.tolist() == [start + 6, 0, 0]
    assert firing.n_tokens.item() == start + 6


def test_ranks_add_up() -> None:
    latents = random_latents(100)
    one, two, whole = (FiringCounts(N_LATENTS) for _ in range(3))
    one.update(latents[:30])
    two.update(latents[30:])
    whole.update(latents)
    one.merge_state(two)
    assert one.n_fired.tolist() == whole.n_fired.tolist()
    assert one.density.tolist() == whole.density.tolist()


def test_planted_rates() -> None:
    """Densities lie inside their binomial intervals, L0 is the sum of the rates, and dead is dead."""
    n_tokens = 200_000
    rates = torch.cat([torch.logspace(-5, math.log10(0.5), 12), torch.zeros(4)])
    l0, firing = L0(16), FiringCounts(16)
    total = torch.zeros(16)
    for _ in range(20):
        active = (torch.rand(n_tokens // 20, 16) < rates).float()
        total += active.sum(0)
        l0.update(active)
        firing.update(SparseLatents.from_dense(active))
    sigma = (rates * (1 - rates) / n_tokens).sqrt()
    assert ((firing.density - rates).abs() <= 5 * sigma + 1e-12).all()
    assert l0.compute()["mean"].item() == pytest.approx(rates.sum().item(), abs=5 * sigma.norm().item())
    dense = rates > 0.1  # none is close to a tenth
    assert firing.compute()["frac_over_1e-1"] == dense.double().mean()
    mass = (total[dense].sum() / total.sum()).item()
    assert firing.compute()["mass_over_1e-1"].item() == pytest.approx(mass, rel=1e-6)
    assert firing.n_fired.tolist() == total.tolist()
    n_dead = int(firing.compute()["n_dead"])
    assert 4 <= n_dead <= 5  # the four of rate zero; with 2 tokens expected, the rarest may not be drawn at all
    assert n_dead == sum(count == 0 for count in total.tolist())


def test_thresholds_of_the_density() -> None:
    """Exactly at a threshold is neither above nor below; dead latents are below every one."""
    firing = FiringCounts(7)
    firing.n_tokens += 10**7
    firing.n_fired += torch.tensor([0, 9, 10, 11, 10**5, 10**5 + 1, 5 * 10**6])
    got = {name: value.item() for name, value in firing.compute().items()}
    assert got["n_dead"] == 1
    assert [got[f"n_below_{t}"] for t in ("1e-5", "1e-6", "1e-7")] == [4, 2, 1]
    assert got["frac_over_1e-2"] == pytest.approx(2 / 7)
    assert got["frac_over_1e-1"] == pytest.approx(1 / 7)
    total = 30 + 2 * 10**5 + 1 + 5 * 10**6
    assert got["mass_over_1e-2"] == pytest.approx((10**5 + 1 + 5 * 10**6) / total)
    assert got["mass_over_1e-1"] == pytest.approx(5 * 10**6 / total)


@pytest.mark.parametrize("n_batches", [1, 7])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_values_are_what_numpy_says(n_batches: int, scale: float) -> None:
    latents = scale * random_latents(500)  # of both signs
    latents[:, 3] = 0
    latents[:, 4] = -latents[:, 4].abs()
    for sparse in (False, True):
        metric = LatentValues(N_LATENTS)
        for part in latents[torch.randperm(500)].tensor_split(n_batches):
            metric.update(SparseLatents.from_dense(part) if sparse else part)
        active = [column[column != 0] for column in latents.double().numpy().T]
        assert metric.n_fired.tolist() == [len(column) for column in active]
        means = [column.mean() if len(column) else math.nan for column in active]
        assert metric.mean.tolist() == pytest.approx(means, rel=1e-6, nan_ok=True)
        maxima = [column.max() if len(column) else math.nan for column in active]
        assert metric.max.tolist() == pytest.approx(maxima, nan_ok=True)
        assert metric.l1_mean.item() == pytest.approx(latents.double().abs().sum(1).mean().item(), rel=1e-6)
    for form in forms(latents):
        assert n_active(form).tolist() == np.count_nonzero(latents.numpy(), axis=1).tolist()


def test_a_stored_zero_is_not_a_value() -> None:
    """The largest value of a latent that is active with a negative value only."""
    metric = LatentValues(2)
    metric.update(SparseLatents(torch.tensor([-2.0, 0.0]), torch.tensor([0, 0]), torch.tensor([0, 1, 2]), 2))
    assert metric.max[0] == -2
    assert metric.mean[0] == -2

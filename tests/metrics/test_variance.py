"""FVU and its relatives against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dictlearn.metrics.alignment import alignment
from dictlearn.metrics.ratio import Places, TokenRatio
from dictlearn.metrics.variance import TokenFVU, Variance

N_TOKENS, D_OUT = 3000, 24


@pytest.fixture
def y() -> Tensor:
    """Targets with a mean that is not zero and dimensions of different spread."""
    return torch.randn(N_TOKENS, 1, D_OUT) * torch.linspace(0.2, 3, D_OUT) + torch.linspace(-2, 5, D_OUT)


def measure(target: Tensor, recon: Tensor, batch: int = 256) -> dict[str, Tensor]:
    n_sites, d_out = target.shape[1:]
    variance, token_fvu = Variance(n_sites, d_out), TokenFVU(n_sites)
    ratios: dict[str, TokenRatio] = {}
    mean = target.double().mean(0)
    for part, recon_part in zip(target.split(batch), recon.split(batch), strict=True):
        variance.update(part, recon_part)
        errors = (part.double() - recon_part.double()).square().sum(-1)
        token_fvu.update(errors, (part.double() - mean).square().sum(-1))
        at = torch.zeros(len(part), dtype=torch.int64)
        for name, parts in alignment(part, recon_part).items():
            ratios.setdefault(name, TokenRatio(1, 1, n_sites)).update(Places(at, at), *parts)
    values = {name: ratio.ratio for name, ratio in ratios.items()}
    values["n_zero_norm"] = len(target) - ratios["cosine"].row_bottom.sum(0)
    return variance.compute() | token_fvu.compute() | values


def numbers(target: Tensor, recon: Tensor, batch: int = 256) -> dict[str, float]:
    return {name: value.item() for name, value in measure(target, recon, batch).items()}


def spread(y: Tensor) -> tuple[float, float, float]:
    """V, ||mu||^2 and mean ||y||^2 with exactly rounded sums."""
    tokens = y.double().squeeze(1).tolist()
    mean = [math.fsum(column) / len(tokens) for column in zip(*tokens, strict=True)]
    v = math.fsum((a - m) ** 2 for token in tokens for a, m in zip(token, mean, strict=True)) / len(tokens)
    return v, math.fsum(m * m for m in mean), math.fsum(a * a for token in tokens for a in token) / len(tokens)


def test_identity(y: Tensor) -> None:
    got = numbers(y, y)
    assert got["fvu"] == 0
    assert got["fve"] == 1
    assert got["mse_per_token"] == 0
    assert got["cosine"] == pytest.approx(1, abs=1e-12)
    assert got["relative_bias"] == pytest.approx(1, abs=1e-12)
    assert got["l2_ratio"] == pytest.approx(1, abs=1e-12)
    assert got["fvu_centred"] == got["fvu_token_median"] == got["fvu_token_p95"] == got["fvu_token_mean"] == 0


def test_mean_predictor(y: Tensor) -> None:
    got = numbers(y.double(), y.double().mean(0, keepdim=True).expand(y.shape))
    assert got["fvu"] == pytest.approx(1, abs=1e-12)
    assert got["fve"] == pytest.approx(0, abs=1e-12)
    assert got["fvu_centred"] == pytest.approx(1, abs=1e-12)
    for name in ("p5", "median", "p95", "mean"):
        assert got[f"fvu_token_{name}"] == 1


def test_zero_predictor(y: Tensor) -> None:
    v, mean_sq, _ = spread(y)
    got = numbers(y, torch.zeros_like(y))
    assert got["fvu"] == pytest.approx(1 + mean_sq / v, rel=1e-12)
    assert math.isnan(got["cosine"])
    assert math.isnan(got["relative_bias"])
    assert got["l2_ratio"] == 0
    assert got["fvu_centred"] == pytest.approx(1, rel=1e-12)
    assert got["n_zero_norm"] == N_TOKENS


@pytest.mark.parametrize("a", [0.25, 0.9, 1.5])
def test_shrink(y: Tensor, a: float) -> None:
    v, _, sq = spread(y)
    got = numbers(y.double(), a * y.double())
    assert got["relative_bias"] == pytest.approx(a, rel=1e-12)
    assert got["l2_ratio"] == pytest.approx(a, rel=1e-12)
    assert got["fvu_centred"] == pytest.approx((1 - a) ** 2, rel=1e-9)
    assert got["cosine"] == pytest.approx(1, rel=1e-12)
    assert got["fvu"] == pytest.approx((1 - a) ** 2 * sq / v, rel=1e-12)
    assert got["mse_per_token"] == pytest.approx((1 - a) ** 2 * sq, rel=1e-12)
    assert got["mse_per_dim"] == pytest.approx((1 - a) ** 2 * sq / D_OUT, rel=1e-12)


def test_noise(y: Tensor) -> None:
    s = 0.7
    v, _, sq = spread(y)
    got = numbers(y, y + s * torch.randn_like(y))
    assert got["fvu"] == pytest.approx(D_OUT * s**2 / v, rel=0.02)
    assert got["relative_bias"] == pytest.approx(1 + D_OUT * s**2 / sq, rel=0.01)


@pytest.mark.parametrize("mean", [0.0, 3000.0, 2.0**20])
@pytest.mark.parametrize("batch", [7, 512])
def test_a_large_mean_does_not_move_fvu(mean: float, batch: int) -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(2048)[:, None, None]  # mean 0, variance 1, exact in float32
    y = mean + signs * torch.ones(D_OUT)
    got = numbers(y, y + 0.5, batch)
    assert got["fvu"] == pytest.approx(0.25, rel=1e-9)
    assert got["mse_per_dim"] == 0.25


@pytest.mark.parametrize("batch", [1, 97, N_TOKENS])
def test_batch_size_and_order_do_not_matter(y: Tensor, batch: int) -> None:
    recon = y + torch.randn_like(y)
    order = torch.randperm(N_TOKENS)
    whole = numbers(y, recon, N_TOKENS)
    assert numbers(y[order], recon[order], batch) == pytest.approx(whole, rel=1e-11)


@pytest.mark.parametrize("c", [1e-4, 30.0, 1e4])
def test_scaling_and_rotation(y: Tensor, c: float) -> None:
    rotation = torch.linalg.qr(torch.randn(D_OUT, D_OUT, dtype=torch.float64)).Q
    y = y.double()
    recon = y + torch.randn_like(y)
    before, after = numbers(y, recon), numbers(c * y @ rotation, c * recon @ rotation)
    scaling = ("mse_per_token", "mse_per_dim")
    for name in before.keys() - scaling:
        assert after[name] == pytest.approx(before[name], rel=1e-6), name
    for name in scaling:
        assert after[name] == pytest.approx(c**2 * before[name], rel=1e-9), name


@pytest.mark.parametrize("n_first", [0, 1, 1234])
def test_ranks_merge_to_the_whole(y: Tensor, n_first: int) -> None:
    """Also for a rank that saw no token."""
    y = y + 3000
    recon = y + torch.randn_like(y)
    metric, other = Variance(1, D_OUT), Variance(1, D_OUT)
    metric.update(y[:n_first], recon[:n_first])
    other.update(y[n_first:], recon[n_first:])
    metric.merge_state(other)
    got = {name: value.item() for name, value in metric.compute().items()}
    whole = numbers(y, recon)
    assert got == pytest.approx({name: whole[name] for name in got}, rel=1e-11)


def test_synchronised_states_are_those_of_all_ranks(y: Tensor) -> None:
    """The gather of torch.distributed replaced by one that returns what three ranks would send."""
    recon = y + torch.randn_like(y)
    ranks = [Variance(1, D_OUT) for _ in range(3)]
    for rank, target, part in zip(ranks, y.tensor_split(3), recon.tensor_split(3), strict=True):
        rank.update(target, part)
    sent = {name: [getattr(rank, name) for rank in ranks] for name in ("moments", "sse", "error_sum")}

    def gather(state: Tensor, group: object = None) -> list[Tensor]:
        return next(states for states in sent.values() if states[0].shape == state.shape)

    ranks[0].sync(dist_sync_fn=gather, distributed_available=lambda: True)
    fvu = numbers(y, recon)["fvu"]
    assert (ranks[0].sse / ranks[0].moments[:, 1]).item() == pytest.approx(fvu, rel=1e-12)


def test_sites_are_measured_one_by_one(y: Tensor) -> None:
    targets = torch.cat([y, 5 * y + 1, y.flip(0)], dim=1)  # [n_tokens, 3, d_out]
    recon = targets + torch.randn_like(targets) * torch.tensor([0.1, 1.0, 3.0])[:, None]
    together = measure(targets, recon)
    for site in range(3):
        alone = numbers(targets[:, site : site + 1], recon[:, site : site + 1])
        assert {name: value[site].item() for name, value in together.items()} == pytest.approx(alone, rel=1e-12)


def test_tokens_of_zero_norm_have_no_cosine(y: Tensor) -> None:
    recon = y.clone()
    recon[:7] = 0  # no direction to compare
    y[7:10] = 0
    got = numbers(y, recon)
    assert got["cosine"] == pytest.approx(1, abs=1e-12)
    assert got["n_zero_norm"] == 10


def test_a_constant_target_has_no_fvu() -> None:
    y = torch.full((10, 1, 4), 0.5)
    assert math.isnan(numbers(y, y)["fvu"])


def test_the_mean_of_the_target(y: Tensor) -> None:
    variance = Variance(1, D_OUT)
    for part in y.split(100):
        variance.update(part, part)
    torch.testing.assert_close(variance.mean, y.double().mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("batch", [1, 1000])
def test_the_distribution_of_the_token_fvu_is_what_numpy_says(y: Tensor, scale: float, batch: int) -> None:
    y = scale * (y + 5)
    recon = y + scale * torch.randn_like(y)
    tokens, guesses = y.squeeze(1).double().numpy(), recon.squeeze(1).double().numpy()
    fvu = ((tokens - guesses) ** 2).sum(1) / ((tokens - tokens.mean(0)) ** 2).sum(1)
    got = numbers(y, recon, batch)
    for name, q in {"p5": 0.05, "median": 0.5, "p95": 0.95}.items():
        assert got[f"fvu_token_{name}"] == pytest.approx(np.quantile(fvu, q), rel=1e-6)
    assert got["fvu_token_mean"] == pytest.approx(fvu.mean(), rel=1e-6)


def test_few_tokens_of_large_norm_rule_the_fvu_and_not_the_median() -> None:
    """1 token in 128 thirty times as large, all with noise of the same size."""
    y = torch.randn(12_800, 1, D_OUT)
    recon = y + 0.5 * torch.randn_like(y)
    usual = numbers(y, recon)
    y[::128] *= 30
    recon[::128] = y[::128]
    got = numbers(y, recon)
    assert got["fvu"] < usual["fvu"] / 5
    assert got["fvu_token_median"] == pytest.approx(usual["fvu_token_median"], rel=0.05)


def test_a_token_at_the_mean_has_no_fvu_of_its_own() -> None:
    metric = TokenFVU(1)
    metric.update(torch.tensor([[0.0], [2.0], [3.0]]), torch.tensor([[0.0], [0.0], [6.0]]))
    assert {value.item() for value in metric.compute().values()} == {0.5}
    nothing = TokenFVU(1)
    nothing.update(torch.ones(2, 1), torch.zeros(2, 1))
    assert all(value.isnan() for value in nothing.compute().values())

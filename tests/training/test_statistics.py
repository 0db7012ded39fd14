"""Training statistics against counting by hand."""

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.statistics import TrainingStatistics
from dictlearn.types import Step


def steps(n: int, sparsifier: str = "top_k") -> list[Step]:
    torch.manual_seed(0)
    made = Linear(6, 6, 16, TopK(3) if sparsifier == "top_k" else ReLU(0.1))
    made.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
    made.b_enc.data[10:] = -100.0  # silent from the start
    return [made.step(x, x, torch.ones(1)) for x in torch.randn(n, 20, 6)]


def count(statistics: TrainingStatistics, step: Step, loss: float) -> None:
    statistics.count(step)
    statistics.end_step(torch.tensor(loss), len(step.x))


def dense(step: Step) -> Tensor:
    return step.latents if isinstance(step.latents, Tensor) else step.latents.to_dense()


@pytest.mark.parametrize("sparsifier", ["top_k", "relu"])
def test_a_window_is_the_mean_over_its_tokens(sparsifier: str) -> None:
    statistics = TrainingStatistics(16, 6, dead_after_tokens=60)
    window = steps(4, sparsifier)
    for i, step in enumerate(window):
        count(statistics, step, float(i))
    metrics = statistics.flush()
    target, recon = torch.cat([s.target for s in window]), torch.cat([s.recon for s in window])
    fvu = (target - recon).square().sum() / (target - target.mean(0)).square().sum()
    l0 = torch.cat([dense(s) for s in window]).ne(0).sum(1).double().mean()
    torch.testing.assert_close(metrics.fvu.float(), fvu)
    torch.testing.assert_close(metrics.l0.double(), l0)
    assert metrics.loss == 1.5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("batch_size", [256, 2048])
def test_sums_are_those_in_float64(batch_size: int, scale: float) -> None:
    """Also where the mean is three times as long as the spread."""
    made = Linear(32, 32, 64, TopK(4))
    made.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 32), torch.zeros(1, 32))
    mean = 3 * torch.randn(32)
    window = [made.step(x, x, torch.ones(1)) for x in scale * (torch.randn(4, batch_size, 32) + mean)]
    statistics = TrainingStatistics(64, 32, dead_after_tokens=60)
    for step in window:
        count(statistics, step, 0.0)
    target, recon = (
        torch.cat(parts).double() for parts in zip(*[(s.target, s.recon) for s in window], strict=True)
    )
    expected = [(target - recon).square().sum(), target.square().sum(), *target.sum(0)]
    got = [*statistics.sums[2:], *statistics.target_sum]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-6, atol=0.0)
    fvu = expected[0] / (target - target.mean(0)).square().sum()
    torch.testing.assert_close(statistics.flush().fvu, fvu, rtol=1e-6, atol=0.0)


def test_the_next_window_starts_empty() -> None:
    statistics = TrainingStatistics(16, 6, dead_after_tokens=60)
    first, second = steps(2)
    count(statistics, first, 1.0)
    statistics.flush()
    count(statistics, second, 3.0)
    assert statistics.flush().loss == 3.0


def test_dead_is_counted_in_tokens() -> None:
    statistics = TrainingStatistics(16, 6, dead_after_tokens=60)
    silent = set(range(10, 16))
    for i, step in enumerate(steps(4), start=1):
        count(statistics, step, 0.0)
        metrics = statistics.flush()
        if 20 * i < 60:
            assert statistics.dead is None
            assert metrics.frac_dead == 0
        else:
            assert statistics.dead is not None
            assert silent <= set(statistics.dead.tolist())
    fired = torch.cat([dense(s) for s in steps(4)[1:]]).gt(0).any(0)  # in the last 60 tokens
    assert statistics.is_dead.tolist() == (~fired).tolist()


def test_a_selected_latent_of_value_zero_has_not_fired() -> None:
    made = Linear(6, 6, 16, TopK(16))
    made.b_enc.data.fill_(-1.0)
    x = torch.zeros(5, 6)
    statistics = TrainingStatistics(16, 6, dead_after_tokens=5)
    count(statistics, made.step(x, x, torch.ones(1)), 0.0)
    assert statistics.flush().l0 == 0
    assert statistics.is_dead.all()


def test_a_dead_latent_that_fires_lives_again() -> None:
    made = Linear.tiny()
    statistics = TrainingStatistics(16, 6, dead_after_tokens=10)
    statistics.tokens_since_fired.fill_(1_000)
    x = torch.randn(200, 6)
    step = made.step(x, x, torch.ones(1))
    count(statistics, step, 0.0)
    statistics.flush()
    assert statistics.is_dead.tolist() == (~dense(step).gt(0).any(0)).tolist()


def test_the_state_holds_half_a_window() -> None:
    whole, first = (TrainingStatistics(16, 6, dead_after_tokens=40) for _ in range(2))
    window = steps(4)
    for i, step in enumerate(window):
        count(whole, step, 1.0)
        if i < 3:
            count(first, step, 1.0)
    resumed = TrainingStatistics(16, 6, dead_after_tokens=40)
    assert resumed.dead is None  # looked at before loading
    resumed.load_state_dict(first.state_dict())
    count(resumed, window[3], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.flush(), resumed.flush(), strict=True))
    again = TrainingStatistics(16, 6, dead_after_tokens=40)
    assert again.dead is None
    again.load_state_dict(whole.state_dict())
    assert whole.dead is not None
    assert again.dead is not None
    assert torch.equal(again.dead, whole.dead)

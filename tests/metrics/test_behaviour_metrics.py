"""Cross-entropy and KL in closed form."""

import math

import pytest
import torch
from torch import Tensor

from dictlearn.metrics import behaviour
from dictlearn.metrics.behaviour import kl_divergence, log_probs, top1_agrees


def cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    return behaviour.cross_entropy(log_probs(logits), tokens).double().mean().item()


def kl(clean: Tensor, patched: Tensor) -> float:
    return kl_divergence(log_probs(clean), log_probs(patched)).double().mean().item()


def two_tokens(p: float) -> Tensor:
    return torch.tensor([[math.log(p) + 3, math.log(1 - p) + 3]], dtype=torch.float64)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.1), (0.9, 0.2), (1e-6, 0.5), (0.3, 0.3)])
def test_two_tokens(p: float, q: float) -> None:
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl(two_tokens(p), two_tokens(q)) == pytest.approx(expected, abs=1e-12)
    assert cross_entropy(two_tokens(p), torch.tensor([0])) == pytest.approx(-math.log(p), abs=1e-12)


def test_a_uniform_prediction_costs_log_vocab() -> None:
    assert cross_entropy(torch.full((5, 661), 7.0), torch.arange(5)) == pytest.approx(math.log(661), abs=1e-6)


def test_kl_ignores_a_constant_and_is_not_negative() -> None:
    logits = torch.randn(50, 300)
    assert abs(kl(logits.double(), logits.double() + 12.5)) < 1e-12
    assert kl(logits, logits) == 0
    for scale in (1e-6, 1e-3, 1.0):
        other = logits.double() + scale * torch.randn(logits.shape, dtype=torch.float64)
        assert kl(logits.double(), other) > 0
        assert kl(logits, other.float()) >= 0


def test_float32_is_as_good_as_float64() -> None:
    clean = 5 * torch.randn(2000, 500)
    tokens = torch.randint(500, (2000,))
    for scale, rel in ((5.0, 1e-7), (1e-2, 1e-4)):
        patched = clean + scale * torch.randn_like(clean)
        assert kl(clean, patched) == pytest.approx(kl(clean.double(), patched.double()), rel=rel)
    assert cross_entropy(clean, tokens) == pytest.approx(cross_entropy(clean.double(), tokens), rel=1e-7)


def test_kl_direction() -> None:
    """KL(clean || patched): all of the clean mass on a token that the patched model finds unlikely is expensive."""
    assert kl(two_tokens(0.999), two_tokens(0.001)) == pytest.approx(0.998 * math.log(999), rel=1e-6)
    assert kl(two_tokens(0.5), two_tokens(1e-9)) > 2 * kl(two_tokens(1e-9), two_tokens(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    clean = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    patched = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    assert kl(clean, patched) == pytest.approx(2e4, rel=0.01)
    assert kl(clean, clean) == 0
    assert cross_entropy(clean, torch.tensor([1])) == pytest.approx(2e4, rel=0.01)


def test_per_prediction_and_inputs_stay_as_they_are() -> None:
    logits = torch.randn(100, 20)
    log_p, log_q = log_probs(logits), log_probs(logits + torch.randn_like(logits))
    before = log_p.clone(), log_q.clone()
    together = kl_divergence(log_p, log_q)
    assert torch.equal(log_p, before[0])
    assert torch.equal(log_q, before[1])
    one_by_one = [kl_divergence(p[None], q[None]).item() for p, q in zip(log_p, log_q, strict=True)]
    assert together.tolist() == pytest.approx(one_by_one, rel=1e-5)


def test_top1() -> None:
    clean = torch.tensor([[1.0, 2.0, 3.0], [5.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    patched = torch.tensor([[0.0, 0.1, 0.2], [1.0, 1.5, 1.2], [-3.0, 9.0, 2.0]])
    assert top1_agrees(log_probs(clean), log_probs(patched)).tolist() == [True, False, True]

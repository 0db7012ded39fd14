"""BatchTopK: the selected set against a sort of the whole batch, and the threshold of inference."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.types import DictlearnError, Encoded
from tests.sparsifiers.steps import N_LATENTS, around, tokens

K = 3


def by_sorting(pre_acts: Tensor, n_kept: int) -> tuple[Tensor, list[float]]:
    """Latents with the `n_kept` largest of all, and the values of these."""
    entries = [(float(v), t, i) for t, row in enumerate(pre_acts) for i, v in enumerate(row)]
    kept = sorted(entries, reverse=True)[:n_kept]
    latents = torch.zeros_like(pre_acts)
    for value, t, i in kept:
        latents[t, i] = max(value, 0.0)
    return latents, [value for value, _, _ in kept]


def encode_step(made: Linear, x: Tensor) -> Encoded:
    return made.encode_step(made.normalise(x))


def select(made: Linear, x: Tensor) -> Encoded:
    """From pre-activations that are there already, as the bilinear dictionary has them."""
    return made.sparsifier.select(made.pre_activations(x))


@pytest.mark.parametrize("encode", [encode_step, select])
@pytest.mark.parametrize("shift", [0.0, -4.0, 4.0])  # few are positive, or all
def test_the_largest_of_the_batch_are_kept(encode: Callable[[Linear, Tensor], Encoded], shift: float) -> None:
    made = around(BatchTopK(K))
    with torch.no_grad():
        made.b_enc.add_(shift)
    x = tokens()
    latents = encode(made, x).latents
    assert not isinstance(latents, Tensor)
    expected, kept = by_sorting(made.pre_activations(x).detach(), K * len(x))
    torch.testing.assert_close(latents.to_dense().detach(), expected)
    positive = [value for value in kept if value > 0]
    assert float(made.get_buffer("sparsifier.threshold")) == pytest.approx(min(positive), rel=1e-5)
    counts = (latents.to_dense() != 0).sum(1)
    assert counts.min() < counts.max()  # tokens differ in how many they have


@pytest.mark.parametrize("encode", [encode_step, select])
def test_gradients_are_those_of_the_dense_rule(encode: Callable[[Linear, Tensor], Encoded]) -> None:
    made, x = around(BatchTopK(K)).double(), tokens().double()
    latents = encode(made, x).latents
    assert not isinstance(latents, Tensor)
    weights = torch.randn(len(x), N_LATENTS).double()
    found = torch.autograd.grad((latents.to_dense() * weights).sum(), [made.W_enc, made.b_enc])
    pre_acts = x @ made.W_enc + made.b_enc
    fires = by_sorting(pre_acts.detach(), K * len(x))[0] != 0
    expected = torch.autograd.grad((pre_acts * fires * weights).sum(), [made.W_enc, made.b_enc])
    torch.testing.assert_close(list(found), list(expected))


def batch_whose_least_is(value: float) -> Tensor:
    """Pre-activations of 4 tokens, of which the least one that k=1 keeps is `value`."""
    pre_acts = torch.full((4, N_LATENTS), value - 10)
    pre_acts[[0, 0, 2, 3], [5, 6, 1, 0]] = value + torch.tensor([0.0, 3.0, 1.0, 2.0])
    return pre_acts


@pytest.mark.parametrize(
    ("n_steps", "window"), [(3, 1.0), (17, 1.7), (200, 20.0), (999, 99.9), (1_000, 100.0), (50_000, 100.0)]
)
def test_the_threshold_is_a_weighted_mean_of_the_least_ones(n_steps: int, window: float) -> None:
    """The weight of a batch is (1 - 1/w)^(age), and weights sum to 1 from the first batch on."""
    made, minima = BatchTopK(1), 1 + 5 * np.random.default_rng(0).random(min(n_steps, 400))
    made.bind(N_LATENTS)
    for step, least in enumerate(minima):
        made.at(step, n_steps)
        made.select(batch_whose_least_is(float(least)))
        if step % 3 == 0:
            made.select(batch_whose_least_is(-4.0).clamp_max(-0.5))  # none is positive
        if step in (0, 1, 7, len(minima) - 1):
            weights = (1 - 1 / window) ** np.arange(step, -1, -1, dtype=np.float64)
            expected = float((weights * minima[: step + 1]).sum() / weights.sum())
            assert float(made.threshold) == pytest.approx(expected, rel=1e-5)
    assert made.n_seen == len(minima)


def test_before_a_run_is_known_the_window_is_the_longest() -> None:
    made, known = BatchTopK(1), BatchTopK(1)
    for step in range(30):
        known.at(step, 10**6)
        for sparsifier in (made, known):
            sparsifier.select(batch_whose_least_is(1.0 + step))
    assert torch.equal(made.threshold, known.threshold)
    assert float(made.threshold) > 1.0 + 14.5  # of a plain mean


def test_a_batch_without_a_positive_one_leaves_the_threshold() -> None:
    made, x = around(BatchTopK(K)), tokens()
    made.step(x, x, torch.ones(1))
    before = made.get_buffer("sparsifier.threshold").clone()
    for value in (-50.0, torch.nan):
        with torch.no_grad():
            made.b_enc.fill_(value)
        made.step(x, x, torch.ones(1))
        assert made.get_buffer("sparsifier.threshold") == before > 0
        assert made.get_buffer("sparsifier.n_seen") == 1


@pytest.mark.parametrize("encode", [encode_step, select])
def test_the_threshold_stays_float32_under_autocast(encode: Callable[[Linear, Tensor], Encoded]) -> None:
    made, exact = around(BatchTopK(K)), around(BatchTopK(K))
    for seed in range(20):
        encode_step(exact, tokens(seed=seed))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            encode(made, tokens(seed=seed))
    threshold, expected = (d.get_buffer("sparsifier.threshold") for d in (made, exact))
    assert threshold.dtype == torch.float32
    rtol = 1e-5 if encode is encode_step else 1e-2  # exactly evaluated, or the mean of rounded ones
    torch.testing.assert_close(threshold, expected, rtol=rtol, atol=0)


def test_inference_keeps_what_exceeds_the_threshold() -> None:
    made, x = around(BatchTopK(K)), tokens()
    torch.testing.assert_close(made.encode(x), made.pre_activations(x).relu())  # before the first step
    for seed in range(20):
        made.step(tokens(seed=seed), tokens(seed=seed), torch.ones(1))
    threshold = float(made.get_buffer("sparsifier.threshold"))
    pre_acts = made.pre_activations(x)
    expected = torch.where(pre_acts > threshold, pre_acts, 0.0)
    torch.testing.assert_close(made.encode(x), expected)
    assert 0.7 * K < float((expected != 0).sum(1).double().mean()) < 1.4 * K
    one = made.encode(x[:1])  # a token does not depend on others
    torch.testing.assert_close(one, expected[:1])
    inference = made.for_inference()
    assert isinstance(inference.sparsifier, JumpReLU)
    norms = made.W_dec.norm(dim=-1)
    torch.testing.assert_close(inference.sparsifier.thresholds, threshold * norms)
    torch.testing.assert_close(inference.encode(x), expected * norms)


def test_one_threshold_cannot_be_scaled_apart() -> None:
    made = around(BatchTopK(K))
    made.step(tokens(), tokens(), torch.ones(1))
    before = made.get_buffer("sparsifier.threshold").clone()
    made.sparsifier.scale_latents_(torch.full((N_LATENTS,), 2.0))
    torch.testing.assert_close(made.get_buffer("sparsifier.threshold"), 2 * before)
    with pytest.raises(DictlearnError, match="one threshold for all latents"):
        made.sparsifier.scale_latents_(torch.linspace(1.0, 2.0, N_LATENTS))

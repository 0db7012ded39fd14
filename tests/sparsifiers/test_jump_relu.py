"""JumpReLU: pseudo-derivatives and penalties against loops over tokens and latents, in float64."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.types import DictlearnError, Step
from tests.sparsifiers.steps import N_LATENTS, VARIANCE, D, around, gradients, penalty_of, step_of, tokens
from tests.sparsifiers.unchecked import unchecked

DEAD = torch.tensor([1, 4, 9])
SPREAD = math.sqrt(float(VARIANCE) / D)  # the target's root mean square about its mean


def jump_relu(**arguments: Any) -> Linear:
    """In float64, with a threshold for each latent and windows that hold about half of the pre-activations."""
    sparsifier = JumpReLU(**{"threshold": 0.3, "bandwidth": 1.5, **arguments})
    made = around(sparsifier, unit=2.0).double()
    with torch.no_grad():
        sparsifier.thresholds.mul_(torch.linspace(0.2, 2.0, N_LATENTS))
    return made


def step_64(dictionary: Linear, dead: Tensor | None = None) -> Step:
    return step_of(dictionary, tokens().double(), dead)


def in_window(pre_act: float, threshold: float, width: float) -> bool:
    return abs((pre_act - threshold) / width) < 0.5


def by_loops(pre_acts: Tensor, thresholds: Tensor, width: float, grads: Tensor, to_inputs: bool) -> list[Tensor]:
    """Latents, and the derivatives of sum(grads * latents) by pre-activations and thresholds."""
    latents, by_pre_act = torch.zeros_like(pre_acts), torch.zeros_like(pre_acts)
    by_threshold = torch.zeros_like(thresholds)
    for t in range(len(pre_acts)):
        for i in range(len(thresholds)):
            pre_act, threshold, grad = (float(v) for v in (pre_acts[t, i], thresholds[i], grads[t, i]))
            if pre_act > threshold:
                latents[t, i] = pre_act
                by_pre_act[t, i] += grad
            if in_window(pre_act, threshold, width):
                by_threshold[i] -= threshold / width * grad
                by_pre_act[t, i] += threshold / width * grad * to_inputs
    return [latents, by_pre_act, by_threshold]


@pytest.mark.parametrize("penalty", ["tanh", "l0"])
def test_pseudo_derivatives(penalty: str) -> None:
    sparsifier = jump_relu(penalty=penalty).sparsifier
    assert isinstance(sparsifier, JumpReLU)
    assert float(sparsifier.width) == 3.0  # 1.5 of a unit of 2
    pre_acts = (2 * torch.randn(30, N_LATENTS).double()).requires_grad_()
    grads = torch.randn(30, N_LATENTS).double()
    latents = sparsifier(pre_acts)
    found = torch.autograd.grad((latents * grads).sum(), [pre_acts, sparsifier.thresholds])
    expected = by_loops(pre_acts.detach(), sparsifier.thresholds.detach(), 3.0, grads, penalty == "tanh")
    torch.testing.assert_close([latents.detach(), *found], expected)
    share = (pre_acts - sparsifier.thresholds).abs().lt(1.5).float().mean()
    assert 0.2 < float(share) < 0.8  # both sides of the window are tried


def test_any_leading_axes_have_the_same_derivatives() -> None:
    sparsifier = jump_relu().sparsifier
    pre_acts, grads = torch.randn(2, 3, N_LATENTS).double(), torch.randn(2, 3, N_LATENTS).double()
    parameters = list(sparsifier.parameters())
    (whole,) = torch.autograd.grad((sparsifier(pre_acts) * grads).sum(), parameters)
    rows = [
        torch.autograd.grad((sparsifier(pre_acts[i, j]) * grads[i, j]).sum(), parameters)[0]
        for i in range(2)
        for j in range(3)
    ]
    torch.testing.assert_close(whole, torch.stack(rows).sum(0))


def test_the_tanh_penalty() -> None:
    """Its value by a loop; its gradients by autograd to the latents and W_dec, and from there by loops."""
    made = jump_relu(coefficient=0.7)
    step = step_64(made)
    penalty = made.penalty(step)
    latents = step.latents
    assert isinstance(latents, Tensor)
    assert step.pre_acts is not None
    norms = made.W_dec.norm(dim=-1).tolist()
    by_hand = sum(math.tanh(4 * f * norms[i] / SPREAD) for row in latents.tolist() for i, f in enumerate(row))
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.7 * by_hand / len(latents))

    leaf, W_dec = latents.detach().requires_grad_(), made.W_dec.detach().requires_grad_()
    dense = 0.7 * (4 * leaf * W_dec.norm(dim=-1) / SPREAD).tanh().sum(-1).mean()
    by_latent, by_W_dec = torch.autograd.grad(dense, [leaf, W_dec])
    pre_acts = step.pre_acts.detach()
    thresholds = made.get_parameter("sparsifier.threshold").detach()
    _, by_pre_act, by_threshold = by_loops(pre_acts, thresholds, 3.0, by_latent, to_inputs=True)
    found = gradients(penalty, made)
    torch.testing.assert_close(found["W_dec"], by_W_dec)
    torch.testing.assert_close(found["sparsifier.threshold"], by_threshold)
    torch.testing.assert_close(found["W_enc"], step.x.T @ by_pre_act)
    torch.testing.assert_close(found["b_enc"], by_pre_act.sum(0))
    assert not found["b_dec"].any()


@pytest.mark.parametrize("target", [None, 3.0, 15.0])
def test_the_l0_penalties(target: float | None) -> None:
    arguments: dict[str, Any] = (
        {"penalty": "l0"} if target is None else {"penalty": "target_l0", "target_l0": target}
    )
    made = jump_relu(coefficient=0.2, **arguments)
    step = step_64(made)
    assert step.pre_acts is not None
    thresholds = made.get_parameter("sparsifier.threshold").tolist()
    rows = step.pre_acts.tolist()
    l0 = sum(pre_act > thresholds[i] for row in rows for i, pre_act in enumerate(row)) / len(rows)
    near = [sum(in_window(row[i], thresholds[i], 3.0) for row in rows) for i in range(N_LATENTS)]
    slope = torch.tensor([-n / 3.0 / len(rows) for n in near]).double()  # of L0 by the thresholds
    value, outer = (l0, 1.0) if target is None else ((l0 / target - 1) ** 2, 2 * (l0 / target - 1) / target)
    penalty = made.penalty(step)
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.2 * value)
    found = gradients(penalty, made)
    torch.testing.assert_close(found.pop("sparsifier.threshold"), 0.2 * outer * slope)
    assert not any(grad.any() for grad in found.values())  # thresholds alone


def test_the_loss_on_pre_activations_of_dead_latents() -> None:
    made = jump_relu(pre_act_coefficient=0.3)
    step = step_64(made, DEAD)
    pre_acts = step.x @ made.W_enc + made.b_enc
    below = (made.get_parameter("sparsifier.threshold") - pre_acts).clamp(min=0)
    every = 0.3 * below * made.W_dec.norm(dim=-1) / SPREAD
    expected = sum(every[:, i].mean() for i in DEAD.tolist())
    assert isinstance(expected, Tensor)
    found = penalty_of(made, step.x, DEAD)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, made), gradients(expected, made))
    assert made.penalty(step_64(made)) is None  # nothing is dead


def test_both_losses_are_summed_and_only_the_first_has_the_ramp() -> None:
    parts = {"coefficient": 0.7}, {"pre_act_coefficient": 0.3}, {"coefficient": 0.7, "pre_act_coefficient": 0.3}
    sparsity, pre_act, both = (jump_relu(ramp=10, **part) for part in parts)
    for made in (sparsity, pre_act, both):
        made.at(2, 100)
    x = tokens().double()
    values = [penalty_of(made, x, DEAD) for made in (sparsity, pre_act)]
    torch.testing.assert_close(penalty_of(both, x, DEAD), values[0] + values[1])
    torch.testing.assert_close(values[0], 0.3 * penalty_of(jump_relu(coefficient=0.7), x))
    torch.testing.assert_close(values[1], penalty_of(jump_relu(pre_act_coefficient=0.3), x, DEAD))


def test_thresholds_start_relative_to_the_unit_and_stay_positive() -> None:
    sparsifier = JumpReLU(threshold=0.3, bandwidth=1.5)
    made = around(sparsifier, unit=20.0)
    torch.testing.assert_close(sparsifier.thresholds, torch.full((N_LATENTS,), 6.0))
    assert float(sparsifier.width) == pytest.approx(30.0)
    with torch.no_grad():
        sparsifier.thresholds[::2] = -1.0
    made.project_()
    assert sparsifier.thresholds.tolist() == [0.0, 6.0] * (N_LATENTS // 2)


@pytest.mark.parametrize("arguments", [{}, {"penalty": "l0"}, {"penalty": "target_l0", "target_l0": 3.0}])
def test_an_inference_dictionary_has_the_true_derivatives(arguments: dict[str, Any]) -> None:
    """Attribution asks for them, not for those that thresholds are trained with."""
    made = jump_relu(coefficient=0.1, **arguments).for_inference()
    x = tokens().double().requires_grad_()
    weights = torch.randn(len(x), N_LATENTS).double()
    (found,) = torch.autograd.grad((made.encode(x) * weights).sum(), x)
    fires = (made.encode(x) != 0).double()
    torch.testing.assert_close(found, (weights * fires) @ made.W_enc.T)


def test_latents_and_penalty_under_autocast() -> None:
    """Products are rounded to bfloat16; thresholds and sums are not."""
    made = jump_relu(coefficient=1.0, pre_act_coefficient=0.1).float()
    x = tokens(2000)
    expected = penalty_of(made, x, DEAD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = penalty_of(made, x, DEAD)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    pairs = gradients(found, made), gradients(expected, made)
    for name, grad in pairs[0].items():
        assert grad.dtype == torch.float32
        assert float((grad - pairs[1][name]).norm()) <= 0.05 * float(pairs[1][name].norm()), name


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"coefficient": -1.0}, "sparsifier.coefficient must be a finite number, at least 0, got -1.0."),
        ({"penalty": "l1"}, "sparsifier.penalty must be one of tanh, l0, target_l0, got 'l1'."),
        ({"bandwidth": 0}, "sparsifier.bandwidth must be a positive number, got 0."),
        ({"threshold": math.nan}, "sparsifier.threshold must be a finite number, at least 0, got nan."),
        ({"target_l0": 0.0, "penalty": "target_l0"}, "must be a positive number or null, got 0.0."),
        ({"target_l0": 5.0}, "goes with penalty=target_l0, got target_l0=5.0 and penalty=tanh."),
        ({"penalty": "target_l0"}, "goes with penalty=target_l0, got target_l0=None and penalty=target_l0."),
        ({"pre_act_coefficient": math.inf}, "sparsifier.pre_act_coefficient must be a finite number"),
        ({"ramp": 0}, "sparsifier.ramp must be null, a whole number of steps from 1, a share of the run"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        unchecked(JumpReLU, **arguments)


def test_an_aim_beyond_the_latents_is_refused() -> None:
    with pytest.raises(DictlearnError, match=r"target_l0 must be at most n_latents = 16, got 17.0"):
        JumpReLU(penalty="target_l0", target_l0=17.0).bind(16)
    JumpReLU(penalty="target_l0", target_l0=16.0).bind(16)

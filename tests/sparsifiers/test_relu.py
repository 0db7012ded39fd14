"""ReLU's L_p penalty and the path of p, against the rules written out."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.relu import SMALLEST, ReLU
from dictlearn.types import DictlearnError
from tests.sparsifiers.steps import VARIANCE, around, gradients, penalty_of, step_of, tokens
from tests.sparsifiers.unchecked import unchecked

N_STEPS = 200


def relu(**arguments: Any) -> Linear:
    return around(ReLU(**{"l1": 0.5, **arguments})).double()


def sum_of_powers(made: Linear, x: Tensor, p: float) -> Tensor:
    """The mean over tokens of sum_i (u_i + s)^p - s^p; for p = 1 that of u_i."""
    latents = (x @ made.W_enc + made.b_enc).clamp(min=0)
    u = latents * made.W_dec.norm(dim=-1) / math.sqrt(float(VARIANCE))
    return ((u + SMALLEST) ** p - SMALLEST**p).sum(-1).mean()


@pytest.mark.parametrize("p", [0.2, 0.7, 1.0])
def test_the_penalty_and_its_gradients(p: float) -> None:
    made, x = relu(p=p), tokens().double()
    found, expected = penalty_of(made, x), 0.5 * sum_of_powers(made, x, p)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, made), gradients(expected, made))


def test_compact_latents_have_the_same_penalty() -> None:
    made, x = relu(p=0.4), tokens().double()
    step = step_of(made, x)
    compact = made.sparsifier.penalty(step.__class__(**{**vars(step), "latents": made.encode_sparse(x)}))
    torch.testing.assert_close(compact, penalty_of(made, x))


def test_in_sixteen_bits_zeros_stay_zero() -> None:
    """s^p, rounded, would be left over on each of them."""
    made, x = relu(p=0.2).float(), tokens(500)
    with torch.no_grad():
        made.b_enc[1:] = -50.0  # one latent fires
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = penalty_of(made, x)
    torch.testing.assert_close(found, penalty_of(made, x), rtol=2e-3, atol=0)


def expected_p(step: int, p: float, anneal_from: float) -> float:
    """Ten equal jumps, the first at `anneal_from` of the run, spread evenly over what is left."""
    if p == 1 or step / N_STEPS < anneal_from:
        return 1.0
    n_jumps = sum(step >= N_STEPS * (anneal_from + (1 - anneal_from) * i / 10) - 1e-9 for i in range(10))
    return 1 - (1 - p) * n_jumps / 10


@pytest.mark.parametrize(("p", "anneal_from"), [(0.2, 0.4), (0.5, 0.0), (0.9, 0.75), (1.0, 0.4)])
def test_the_path_of_p(p: float, anneal_from: float) -> None:
    sparsifier = ReLU(0.5, p, anneal_from)
    assert sparsifier.p_now == p  # without a run, its end
    path = []
    for step in range(N_STEPS):
        sparsifier.at(step, N_STEPS)
        path.append(sparsifier.p_now)
    assert path == pytest.approx([expected_p(step, p, anneal_from) for step in range(N_STEPS)])
    assert path[-1] == pytest.approx(p)


def test_the_penalty_does_not_move_when_p_jumps() -> None:
    """The weight is rescaled by the sums on the batch at the jump, and keeps that until the next one."""
    made = relu(p=0.2)
    weight, before = 0.5, 1.0
    for step in range(N_STEPS):
        made.at(step, N_STEPS)
        x, p = tokens(20, seed=step).double(), expected_p(step, 0.2, 0.4)
        if p != before:
            unmoved = weight * sum_of_powers(made, x, before)
            torch.testing.assert_close(penalty_of(made, x), unmoved)
            weight = float((unmoved / sum_of_powers(made, x, p)).detach())
        torch.testing.assert_close(penalty_of(made, x), weight * sum_of_powers(made, x, p))  # it jumps once
        before = p
    assert weight != 0.5


@pytest.mark.parametrize("stopped_at", [79, 80, 81, 150])  # p first moves at 80
def test_a_resumed_run_has_the_same_penalty(stopped_at: int) -> None:
    def run(made: Linear, steps: range) -> list[float]:
        found = []
        for step in steps:
            made.at(step, N_STEPS)
            found.append(float(penalty_of(made, tokens(20, seed=step).double()).detach()))
        return found

    whole = run(relu(p=0.2), range(N_STEPS))
    first, second = relu(p=0.2), relu(p=0.2)
    run(first, range(stopped_at))
    second.load_state_dict(first.state_dict())
    assert run(second, range(stopped_at, N_STEPS)) == whole[stopped_at:]


def test_a_jump_on_a_batch_without_latents_leaves_the_weight() -> None:
    made = relu(p=0.2)
    with torch.no_grad():
        made.b_enc.fill_(-50.0)
    for step in range(N_STEPS):
        made.at(step, N_STEPS)
        assert penalty_of(made, tokens().double()) == 0
    assert made.get_buffer("sparsifier.scale") == 1


@pytest.mark.parametrize("ramp", [None, 10, "run", 1000])
def test_the_weight_rises_over_its_ramp(ramp: int | str | None) -> None:
    made, x = relu(ramp=ramp), tokens().double()
    full = 0.5 * sum_of_powers(made, x, 1.0)
    length = {None: 1, 10: 10}.get(ramp, N_STEPS)  # type: ignore[call-overload]
    for step in (0, 1, 8, 9, 10, 100, N_STEPS - 1):
        made.at(step, N_STEPS)
        torch.testing.assert_close(penalty_of(made, x), full * min(1.0, (step + 1) / length))


@pytest.mark.parametrize("value", [0, -0.5, 1.5, math.nan, "1", True, None])
def test_a_p_that_is_no_exponent_is_refused(value: Any) -> None:
    rule = f"sparsifier.p must be a number above 0 and at most 1, got {value!r}."
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        unchecked(ReLU, l1=0.1, p=value)


@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan, "0", False])
def test_a_share_of_the_run_is_at_most_one(value: Any) -> None:
    rule = f"sparsifier.anneal_from must be a number of at least 0 and at most 1, got {value!r}."
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        unchecked(ReLU, l1=0.1, anneal_from=value)

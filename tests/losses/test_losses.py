"""Losses against their formulas, written out in float64."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.dictionaries.matryoshka import Matryoshka
from dictlearn.losses import aux_k
from dictlearn.losses.aux_k import AuxK
from dictlearn.losses.recon import recon_loss
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError, Step
from tests.sparsifiers.unchecked import unchecked

DEAD = torch.tensor([1, 4, 9, 15])


def step_of(dead: Tensor | None = DEAD, n_tokens: int = 32, scale: float = 1.0) -> Step:
    torch.manual_seed(2)
    tiny = Linear.tiny()
    tiny.read_scale.fill_(1 / scale)
    tiny.write_scale.fill_(1 / scale)
    x = scale * torch.randn(n_tokens, 6)
    return tiny.step(x, x, torch.ones(1), dead)


def test_recon_is_the_squared_error_over_the_variance() -> None:
    torch.manual_seed(0)
    tiny = Crosscoder.tiny()
    x, y = torch.randn(10, 2, 6), torch.randn(10, 2, 6)
    variance = torch.tensor([2.0, 5.0])
    error = (y - tiny(x).recon).square().sum(-1).mean(0)  # [n_writes]
    expected = (error / variance).mean()
    torch.testing.assert_close(recon_loss(tiny.step(x, y, variance)), expected)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_losses_do_not_depend_on_the_activation_scale(scale: float) -> None:
    step, other = step_of(), step_of(scale=scale)
    torch.testing.assert_close(recon_loss(step), recon_loss(other))
    torch.testing.assert_close(AuxK()(step), AuxK()(other))


def test_recon_is_the_same_for_a_batch_and_its_copy() -> None:
    tiny = Linear.tiny()
    x = torch.randn(8, 6)
    one, two = (recon_loss(tiny.step(b, b, torch.ones(1))) for b in (x, torch.cat([x, x])))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("k", [1, 3, 4, 9])
def test_aux_k_by_hand(k: int) -> None:
    step = step_of()
    d = step.dictionary
    pre = (step.x @ d.W_enc + d.b_enc)[:, DEAD]
    kept = torch.zeros_like(pre)
    for row, values in enumerate(pre):
        for index in values.argsort(descending=True)[:k]:
            kept[row, index] = values[index].clamp(min=0)
    recon = kept @ d.W_dec[DEAD]  # no bias
    residual = step.target - step.recon
    fvu = (residual - recon).square().sum() / (residual - residual.mean(0)).square().sum()
    expected = 0.25 * min(1.0, len(DEAD) / k) * fvu
    torch.testing.assert_close(AuxK(0.25, k)(step), expected)


def bilinear_products(d: Dictionary, x: Tensor) -> Tensor:
    return (x @ d.W_enc + d.b_enc) * (x @ d.get_parameter("W_gate") + d.get_parameter("b_gate"))


OTHERS: dict[str, tuple[Callable[[], Dictionary], Callable[[Dictionary, Tensor], Tensor]]] = {
    "signed": (lambda: Linear(6, 6, 16, AbsTopK(4)), lambda d, x: x @ d.W_enc + d.b_enc),
    "bilinear": (Bilinear.tiny, bilinear_products),
    "matryoshka": (Matryoshka.tiny, lambda d, x: x @ d.W_enc + d.b_enc),
    "signed bilinear": (lambda: Bilinear(6, 6, 16, AbsTopK(4)), bilinear_products),
}


@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize("sparse", [False, True])  # the other way of choosing among many dead latents
@pytest.mark.parametrize("kind", OTHERS)
def test_aux_k_of_other_dictionaries(kind: str, sparse: bool, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pre-activations are those of the kind; of signed latents the largest by size count, with their signs."""
    monkeypatch.setattr(aux_k, "DENSE_BELOW", 0 if sparse else 16)
    make, pre_activations = OTHERS[kind]
    d = make()
    for parameter in d.parameters():
        parameter.data.normal_()
    x = torch.randn(32, 6)
    step = d.step(x, x, torch.ones(1), DEAD)
    pre, signed = pre_activations(d, x)[:, DEAD], kind.startswith("signed")
    kept = torch.zeros_like(pre)
    for t, row in enumerate(pre.tolist()):
        for i in sorted(range(4), key=lambda i, row=row: -abs(row[i]) if signed else -row[i])[:k]:
            kept[t, i] = pre[t, i] if signed else pre[t, i].clamp(min=0)
    residual = (step.target - step.recon).detach()
    fvu = (residual - kept @ d.W_dec[DEAD]).square().sum() / (residual - residual.mean(0)).square().sum()
    found, expected = AuxK(0.25, k)(step), 0.25 * min(1.0, 4 / k) * fvu
    assert found is not None
    torch.testing.assert_close(found, expected)
    parameters = list(d.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True),
    )


def test_aux_k_takes_half_the_read_width_by_default() -> None:
    step = step_of()  # 6 wide
    torch.testing.assert_close(AuxK(0.25)(step), AuxK(0.25, 3)(step))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(AuxK(0.25)(step), AuxK(0.25, 2)(step))


def test_aux_k_trains_dead_latents_alone_in_encoder_and_decoder() -> None:
    step = step_of()
    value = AuxK()(step)
    assert value is not None
    value.backward()
    d = step.dictionary
    alive = torch.ones(16, dtype=torch.bool)
    alive[DEAD] = False
    assert d.W_enc.grad is not None
    for name, per_latent in {"W_enc": d.W_enc.grad.T, "b_enc": d.b_enc.grad, "W_dec": d.W_dec.grad}.items():
        assert per_latent[DEAD].any(), f"AuxK does not reach {name}"
        assert not per_latent[alive].any(), f"AuxK leaks into living latents of {name}"
    assert d.b_dec.grad is None  # the residual is detached, and the bias is counted in it already


def test_aux_k_descends_on_the_encoder() -> None:
    """A step along the encoder's gradient lowers the term: the gradient is the gradient."""
    step = step_of()
    d, term = step.dictionary, AuxK()
    before = term(step)
    assert before is not None
    (grad,) = torch.autograd.grad(before, d.W_enc)
    with torch.no_grad():
        d.W_enc.sub_(0.05 * grad)
    after = term(Step(d, step.x, step.target, step.recon.detach(), step.latents, step.variance, DEAD))
    assert after is not None
    assert after < before


def test_aux_k_without_dead_latents_costs_nothing() -> None:
    assert AuxK()(step_of(dead=None)) is None


def cross_layer_relu() -> CrossLayer:
    return CrossLayer(6, 6, 16, ReLU(0.1), ["a", "b"], ["c", "d"])


@pytest.mark.parametrize("make", [lambda: Linear(6, 6, 16, ReLU(0.1)), Gated.tiny, cross_layer_relu])
def test_aux_k_is_left_out_where_every_positive_pre_activation_fires(make: Callable[[], Dictionary]) -> None:
    """Written out, it is a constant: dead latents explain nothing of the residual, and no gradient arrives."""
    d = make()
    for parameter in d.parameters():
        parameter.data.normal_()
    d.b_enc.data[DEAD] = -50.0
    axes = (len(d.reads), 6) if d.site_axis else (6,)
    x, target = torch.randn(32, *axes), torch.randn(32, *axes)
    step = d.step(x, target, torch.ones(len(d.writes)), DEAD)
    assert isinstance(step.latents, Tensor)
    assert not step.latents[:, DEAD].any()
    code = (d.products(step.x) + d.b_enc).relu() * torch.isin(torch.arange(16), DEAD)
    residual = (step.target - step.recon).detach()
    fvu = (residual - code @ d.flat_W_dec).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(fvu, residual.square().sum() / (residual - residual.mean(0)).square().sum())
    parameters = [p for p in d.parameters() if p.requires_grad]
    grads = torch.autograd.grad(fvu, parameters, allow_unused=True, materialize_grads=True)
    assert not any(grad.any() for grad in grads)
    assert AuxK()(step) is None
    assert not AuxK().revives(d)


def test_aux_k_of_one_token_is_nothing() -> None:
    d = Linear.tiny()
    x = torch.randn(2, 6)
    assert AuxK()(d.step(x[:1], x[:1], torch.ones(1), DEAD)) is None  # one residual has no variance
    assert AuxK()(d.step(x, x, torch.ones(1), DEAD)) is not None
    chunk = replace(d.step(x[:1], x[:1], torch.ones(1), DEAD), residual_variance=torch.tensor(2.0))
    assert AuxK()(chunk) is not None


@pytest.mark.parametrize("k", [0, -3, 2.5, 2.0, "4", True, math.nan])
def test_aux_k_refuses_a_k_that_is_no_count(k: Any) -> None:
    rule = f"aux_k.k must be null or a whole number, at least 1, got {k!r}."
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        unchecked(AuxK, k=k)


@pytest.mark.parametrize("coefficient", [-0.1, math.nan, math.inf, -math.inf, "0.1", None, True, [0.1]])
def test_aux_k_refuses_a_coefficient_that_is_no_weight(coefficient: Any) -> None:
    rule = f"aux_k.coefficient must be a finite number, at least 0, got {coefficient!r}."
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        unchecked(AuxK, coefficient=coefficient)


def test_aux_k_takes_whole_coefficients() -> None:
    assert AuxK(coefficient=0).coefficient == 0
    assert AuxK(coefficient=1, k=7).k == 7


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("copies", [1, 4])
def test_l1_is_norm_weighted_and_free_of_batch_size_and_scale(scale: float, copies: int) -> None:
    torch.manual_seed(0)
    made = Linear(6, 6, 16, ReLU(0.5))
    made.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
    made.W_dec.data.mul_(torch.linspace(0.2, 3.0, 16).unsqueeze(-1))
    x = torch.randn(8, 6)
    by_hand = 0.5 * sum(
        (x @ made.W_enc + made.b_enc).clamp(min=0)[:, i].mean() * made.W_dec[i].norm() for i in range(16)
    )
    variance = torch.tensor([4.0])
    made.read_scale.fill_(1 / scale)
    made.write_scale.fill_(1 / scale)
    batch = scale * x.repeat(copies, 1)
    penalty = made.sparsifier.penalty(made.step(batch, batch, variance))
    torch.testing.assert_close(penalty, by_hand / 2.0)

"""The gated dictionary against its formulas, latent by latent."""

import math

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError

L1, VARIANCE = 0.3, torch.tensor([4.0])


def gated(skip: bool = False, transcoder: bool = False) -> Gated:
    """Any weights: gates that open below, at and above the magnitude's zero."""
    sites = (["a"], ["b"]) if transcoder else (["a"], ["a"])
    made = Gated(6, 6, 64, ReLU(L1), *sites, skip=skip)
    for parameter in made.parameters():
        parameter.data.normal_()
    made.read_scale.fill_(0.7)
    made.write_scale.fill_(1.3)
    return made


def by_loops(made: Gated, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and gates of normalised reads."""
    latents, gates = torch.zeros(len(x), made.n_latents), torch.zeros(len(x), made.n_latents)
    products = (x @ made.W_enc).tolist()
    rows = zip(made.r_mag.tolist(), made.b_mag.tolist(), made.b_enc.tolist(), strict=True)
    for i, (r_mag, b_mag, b_gate) in enumerate(rows):
        for t, product in enumerate(products):
            gates[t, i] = product[i] + b_gate
            if gates[t, i] > 0:
                latents[t, i] = max(math.exp(r_mag) * product[i] + b_mag, 0.0)
    return latents, gates


def test_latents_and_gates() -> None:
    made, x = gated(), torch.randn(50, 6)
    latents, gates = by_loops(made, 0.7 * x)
    out = made(x)
    torch.testing.assert_close(out.latents, latents)
    torch.testing.assert_close(out.pre_acts, gates)
    torch.testing.assert_close(made.encode_sparse(x).to_dense(), latents)
    torch.testing.assert_close(out.recon, (latents @ made.W_dec + made.b_dec) / 1.3)
    step = made.step(x, x, VARIANCE)
    torch.testing.assert_close(step.latents, latents)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcoder", [False, True])
def test_losses_and_penalty(skip: bool, transcoder: bool) -> None:
    made, x = gated(skip, transcoder), torch.randn(50, 6)
    y = torch.randn(50, 6) if transcoder else x
    step = made.step(x, y, VARIANCE)
    latents, gates = by_loops(made, 0.7 * x)
    rest = made.b_dec + (0.7 * x @ made.W_skip.T if made.W_skip is not None else 0)
    for name, code in (("recon", latents), ("gate", gates.relu())):
        error = 1.3 * y - code @ made.W_dec - rest
        torch.testing.assert_close(made.losses(step)[name], error.square().sum(-1).mean() / 4)
    expected = L1 * (gates.relu() * made.W_dec.norm(dim=-1)).sum(-1).mean() / 2
    torch.testing.assert_close(made.penalty(step), expected)


@pytest.mark.parametrize("skip", [False, True])
def test_the_gate_loss_has_a_frozen_decoder_and_the_penalty_leaves_magnitudes(skip: bool) -> None:
    made, x = gated(skip), torch.randn(50, 6)
    step = made.step(x, x, VARIANCE)

    def reached(loss: Tensor) -> set[str]:
        names, parameters = zip(*made.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return {name for name, grad in zip(names, found, strict=True) if grad is not None}

    assert reached(made.losses(step)["gate"]) == {"W_enc", "b_enc"}
    penalty = made.penalty(step)
    assert penalty is not None
    assert reached(penalty) == {"W_enc", "b_enc"}


def test_inference_is_a_jump_relu() -> None:
    """The same latents but for a factor, also where a gate opens only where the magnitude is negative."""
    made, x = gated(), torch.randn(2000, 6)
    with torch.no_grad():
        made.b_mag[:8] = -6.0  # open gates whose magnitude is negative: an (unclamped) threshold below 0
        made.b_mag[8:16] = 6.0
    thresholds = made.b_mag - made.r_mag.exp() * made.b_enc
    assert (thresholds < 0).any()
    assert (thresholds > 0).any()
    folded = made.for_inference()
    assert type(folded) is Linear
    assert isinstance(folded.sparsifier, JumpReLU)
    assert (folded.sparsifier.thresholds >= 0).all()
    norms = made.W_dec.norm(dim=-1)
    torch.testing.assert_close(folded.sparsifier.thresholds, thresholds.clamp(min=0) * norms / 1.3)
    torch.testing.assert_close(folded.encode(x), made.encode(x) * norms / 1.3, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded(x).recon, made(x).recon, rtol=1e-5, atol=1e-5)
    assert ((x @ folded.W_enc + folded.b_enc > 0) & (made.encode(x) == 0)).any()  # closed gates


@pytest.mark.parametrize("sparsifier", [ReLU(0.1), JumpReLU()])
def test_it_starts_from_a_linear_dictionary(sparsifier: ReLU | JumpReLU) -> None:
    other = Linear(6, 6, 64, sparsifier, ["a"], ["a"])
    for parameter in other.parameters():
        parameter.data.normal_()
    other.project_()
    made = gated()
    made.start_from_(other.for_inference())
    x = torch.randn(500, 6)
    torch.testing.assert_close(made(x).recon, other(x).recon, rtol=1e-4, atol=1e-4)
    assert torch.equal(made.encode(x) != 0, other.encode(x) != 0)
    with pytest.raises(DictlearnError, match="n_latents is 16 there and 64 here"):
        made.start_from_(Linear(6, 6, 16, ReLU(0.1), ["a"], ["a"]))


def test_gates_and_magnitudes_start_alike() -> None:
    made = Gated(6, 6, 64, ReLU(L1))
    mean = torch.randn(1, 6)
    made.initialise_(torch.Generator().manual_seed(0), mean, mean)
    x = torch.randn(40, 6)
    torch.testing.assert_close(made.encode(x), ((x - mean) @ made.W_enc).relu(), rtol=1e-4, atol=1e-5)

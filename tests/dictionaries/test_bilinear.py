"""The bilinear dictionary against its formula."""

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import SparseLatents


def bilinear(sparsifier: Sparsifier) -> Bilinear:
    made = Bilinear(6, 5, 16, sparsifier, ["a"], ["b"], skip=True)
    for parameter in made.parameters():
        parameter.data.normal_()
    made.read_scale.fill_(0.7)
    made.write_scale.fill_(1.3)
    return made


def by_loops(made: Bilinear, x: Tensor) -> Tensor:
    """Pre-activations of normalised reads."""
    rows = []
    for token in x:
        own = zip(made.W_enc.T, made.b_enc, made.W_gate.T, made.b_gate, strict=True)
        rows.append(torch.stack([((token * a).sum() + b) * ((token * c).sum() + d) for a, b, c, d in own]))
    return torch.stack(rows)


@pytest.mark.parametrize("sparsifier", [ReLU(0.1), TopK(4), AbsTopK(4)])
def test_pre_activations_are_the_product_of_two_linear_maps(sparsifier: Sparsifier) -> None:
    made, x = bilinear(sparsifier), torch.randn(30, 6)
    pre_acts = by_loops(made, 0.7 * x)
    torch.testing.assert_close(made.pre_activations(x), pre_acts)
    latents = sparsifier(pre_acts)
    torch.testing.assert_close(made.encode(x), latents)
    torch.testing.assert_close(made.encode_sparse(x).to_dense(), latents)
    step = made.step(x, torch.randn(30, 5), torch.ones(1))
    found = step.latents.to_dense() if isinstance(step.latents, SparseLatents) else step.latents
    torch.testing.assert_close(found, latents)
    weights = torch.randn(30, 16)
    names = ["W_enc", "b_enc", "W_gate", "b_gate"]
    parameters = [made.get_parameter(name) for name in names]
    expected = torch.autograd.grad((latents * weights).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), parameters), expected)


def test_it_starts_as_the_linear_dictionary() -> None:
    mean, x = torch.randn(1, 6), torch.randn(30, 6)
    made, linear = Bilinear(6, 6, 16, TopK(4)), Linear(6, 6, 16, TopK(4))
    for dictionary in (made, linear):
        dictionary.initialise_(torch.Generator().manual_seed(0), mean, mean)
    torch.testing.assert_close(made(x).recon, linear(x).recon)
    made.losses(made.step(x, x, torch.ones(1)))["recon"].backward()
    assert made.W_gate.grad is not None
    assert made.W_gate.grad.any()  # it leaves that start

"""The plan's estimate of a training step against torch's count of the products in it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.dictionaries.matryoshka import Matryoshka
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.plan import _flops_per_token

D, N_LATENTS, N_TOKENS, K = 32, 512, 64, 8


def counted(made: Dictionary) -> float:
    """Of dense products, per token."""
    x = torch.randn(N_TOKENS, D)
    with FlopCounterMode(display=False) as counter:
        step = made.step(x, x, torch.ones(1))
        penalty = made.penalty(step)
        parts = [*made.losses(step).values(), *([] if penalty is None else [penalty])]
        torch.stack(parts).sum().backward()
    return counter.get_total_flops() / N_TOKENS


@pytest.mark.parametrize("sparsifier", [ReLU(0.1), JumpReLU(0.1)])
@pytest.mark.parametrize("kind", [Linear, Gated, Matryoshka, Bilinear])
def test_of_dense_codes(kind: type[Dictionary], sparsifier: Sparsifier) -> None:
    if kind is Gated and not isinstance(sparsifier, ReLU):
        pytest.skip("gates have the penalty of relu")
    made = kind(D, D, N_LATENTS, sparsifier)
    assert _flops_per_token(made) == counted(made)


@pytest.mark.parametrize("kind", [Linear, Bilinear])
def test_of_compact_codes(kind: type[Dictionary]) -> None:
    """The dense products are counted; the others touch k rows of the weights."""
    made = kind(D, D, N_LATENTS, TopK(K))
    assert 0 < _flops_per_token(made) - counted(made) <= 8 * K * 2 * D

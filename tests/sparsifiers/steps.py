"""Small dictionaries around a sparsifier, with any weights, and steps of theirs."""

import torch
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers import Sparsifier
from dictlearn.types import Step

D, N_LATENTS = 6, 16
VARIANCE = torch.tensor([4.0])


def around(sparsifier: Sparsifier, unit: float = 1.0) -> Linear:
    """Rows of W_dec have norms of their own."""
    made = Linear(D, D, N_LATENTS, sparsifier, decoder_norm="free")
    make = torch.Generator().manual_seed(3)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        made.get_parameter(name).data.normal_(generator=make)
    made.set_unit_(torch.tensor([unit]))
    return made


def tokens(n: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def step_of(dictionary: Linear, x: Tensor | None = None, dead: Tensor | None = None) -> Step:
    x = tokens() if x is None else x
    return dictionary.step(x, x, VARIANCE.to(x.dtype), dead)


def penalty_of(dictionary: Linear, x: Tensor | None = None, dead: Tensor | None = None) -> Tensor:
    penalty = dictionary.penalty(step_of(dictionary, x, dead))
    assert penalty is not None
    return penalty


def gradients(loss: Tensor, dictionary: Linear) -> dict[str, Tensor]:
    """By parameter, zero where none arrives."""
    names, parameters = zip(*dictionary.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(names, parameters, found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for name, p, grad in pairs}

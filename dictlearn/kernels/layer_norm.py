"""Per-token layer normalisation without weights, as SAELens' `normalize_activations: layer_norm`."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

EPS = 1e-5


class LayerNormed(NamedTuple):
    """`z = (x - mean) / (std + EPS)`; what undoes it is `z * std + mean`, without EPS, as there."""

    z: Float[Tensor, "*batch d"]
    mean: Float[Tensor, "*batch 1"]
    std: Float[Tensor, "*batch 1"]  # unbiased, d - 1


def layer_norm(x: Float[Tensor, "*batch d"]) -> LayerNormed:
    """`z = (x - mean) / (std + 1e-5)` over the last axis, std unbiased.

    Not torch's `layer_norm`, whose eps is inside the root of the biased variance. Differentiable; in the type of
    `x`. Raises ValueError where d is 1, which has no unbiased standard deviation.
    """
    if x.shape[-1] < 2:
        raise ValueError(f"layer_norm needs at least two dimensions per token, got shape {tuple(x.shape)}")
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    std = centred.std(-1, keepdim=True)
    return LayerNormed(centred / (std + EPS), mean, std)

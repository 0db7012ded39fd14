"""Per-token layer normalisation without weights, as SAELens' `normalize_activations: layer_norm`."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

EPS = 1e-5


class LayerNormed(NamedTuple):
    """`x == z * std + mean` (up to rounding): what undoes the normalisation of each token."""

    z: Float[Tensor, "*batch d"]
    mean: Float[Tensor, "*batch 1"]
    std: Float[Tensor, "*batch 1"]  # with EPS already added


def layer_norm(x: Float[Tensor, "*batch d"]) -> LayerNormed:
    """`z = (x - mean) / std` over the last axis, std = (unbiased standard deviation, d - 1) + 1e-5.

    Not torch's `layer_norm`, whose eps is inside the root of the biased variance. Differentiable; in the type of
    `x`. Raises ValueError where d is 1, which has no unbiased standard deviation.
    """
    if x.shape[-1] < 2:
        raise ValueError(f"layer_norm needs at least two dimensions per token, got shape {tuple(x.shape)}")
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    std = centred.std(-1, keepdim=True) + EPS
    return LayerNormed(centred / std, mean, std)

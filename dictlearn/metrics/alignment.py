"""Direction and length of a reconstruction against its target."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.metrics.variance import Targets


class Parts(NamedTuple):
    """What each token adds to the two sums of a `TokenRatio`, float64."""

    top: Float[Tensor, "n_tokens n_sites"]
    bottom: Float[Tensor, "n_tokens n_sites"]


def alignment(target: Targets, recon: Targets) -> dict[str, Parts]:
    """Whether reconstructions y_hat point along their targets y, and whether they are too short; per token.

    - `cosine`: mean over tokens of <y, y_hat> / (||y|| ||y_hat||). A token whose target or reconstruction is
      zero has no cosine: it is left out of the mean (its `bottom` is 0).
    - `l2_ratio`: mean over tokens of ||y_hat|| / ||y||, without those whose target is zero.
    - `relative_bias`: sum ||y_hat||^2 / sum <y, y_hat>; 1 is unbiased, below 1 is shrinkage (Rajamanoharan et
      al. 2024, Improving Dictionary Learning with Gated Sparse Autoencoders, eq. 10, with global sums).
    """
    y, y_hat = target.double(), recon.double()
    dot = (y * y_hat).sum(-1)  # [n_tokens, n_sites]
    norm, recon_norm = y.norm(dim=-1), y_hat.norm(dim=-1)
    norms = norm * recon_norm
    return {
        "cosine": Parts(torch.where(norms > 0, dot / norms, 0), (norms > 0).double()),
        "l2_ratio": Parts(torch.where(norm > 0, recon_norm / norm, 0), (norm > 0).double()),
        "relative_bias": Parts(recon_norm.square(), dot),
    }

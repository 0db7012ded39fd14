"""Reconstruction loss."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dictlearn.types import Scalar, Step


def recon_loss(step: Step, error: Float[Tensor, "n writes"] | None = None) -> Scalar:
    """Squared error per token over the target's variance: the FVU with a fixed denominator.

    The denominator is a constant of the run (not the batch's), so the loss is linear in the batch. Several write
    sites count alike: the mean of their ratios. `error` stands for target - recon where it is another one's.
    """
    error = step.target - step.recon if error is None else error
    squares = step.per_site(error.square())  # [n, n_writes, d_out]
    return (squares.sum(-1).mean(0) / step.variance).mean()

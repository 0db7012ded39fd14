"""Reconstruction loss."""

from __future__ import annotations

from dictlearn.types import Scalar, Step


def recon_loss(step: Step) -> Scalar:
    """Squared error per token over the target's variance: the FVU with a fixed denominator.

    The denominator is a constant of the run (not the batch's), so the loss is linear in the batch. Several write
    sites count alike: the mean of their ratios.
    """
    error = step.per_site((step.target - step.recon).square())  # [batch, n_writes, d_out]
    return (error.sum(-1).mean(0) / step.variance).mean()

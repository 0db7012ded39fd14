"""AuxK: dead latents learn to explain what the living ones leave over (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dictlearn.kernels import encode_abs_top_k, encode_top_k
from dictlearn.types import DictlearnError, Latents, Scalar, Step

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

DENSE_BELOW = 16  # dead latents per wanted one: fewer cost less as dense products than as sparse ones


class AuxK:
    """`coefficient` times the FVU of the residual under the `k` largest dead latents.

    The residual is detached and has no bias in it, so the decoded dead latents get none either; their ReLU'd
    pre-activations are computed with gradient, so the encoder learns; where latents are signed, the largest are
    those by absolute value, and keep their signs. With fewer than `k` dead latents the term is
    scaled down in proportion. Cost: one product with the dead columns only, nothing when there are none.

    Where every positive pre-activation fires (ReLU, the gates of a gated dictionary), a dead latent has none: the
    term would be a constant without gradient, and is left out.

    Args:
        coefficient: weight of the term; the paper uses 1/32.
        k: number of dead latents per token; None: half the read width.

    Raises DictlearnError for a negative or infinite coefficient, and for a `k` that is no count.
    """

    def __init__(self, coefficient: float = 1 / 32, k: int | None = None) -> None:
        number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
        if not number or not 0 <= coefficient < math.inf:
            raise DictlearnError(f"aux_k.coefficient must be a finite number, at least 0, got {coefficient!r}.")
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise DictlearnError(f"aux_k.k must be null or a whole number, at least 1, got {k!r}.")
        self.coefficient, self.k = coefficient, k

    def revives(self, dictionary: Dictionary) -> bool:
        """Whether dead latents of this dictionary can have pre-activations that learn."""
        return dictionary.sparsifier.leaves_positive

    def __call__(self, step: Step) -> Scalar | None:
        """None where and while it revives none, and for a batch of one token, whose residual has no variance."""
        if step.dead is None or not self.revives(step.dictionary):
            return None
        if len(step.x) == 1 and step.residual_variance is None:
            return None
        n_dead = len(step.dead)
        wanted = self.k or max(1, step.x.shape[-1] // 2)
        rows = step.dead_rows or step.dictionary.latent_rows(step.dead)
        k, signed = min(wanted, n_dead), step.dictionary.sparsifier.signed
        if n_dead <= DENSE_BELOW * k or not step.dictionary.linear_encoder:
            pre_acts = step.dictionary.row_pre_acts(step.x, rows, step.dead)  # [batch, n_dead]
            latents: Latents = _dense_top_k(pre_acts, k, signed)
        else:
            encode = encode_abs_top_k if signed else encode_top_k
            latents = encode(step.x, rows["W_enc"].T, rows["b_enc"], k)
        residual = (step.target - step.recon).detach()
        explained = step.dictionary.decode_rows(latents, rows, step.dead)
        error = F.mse_loss(explained, residual, reduction="sum") / len(residual)
        variance = _variance(residual) if step.residual_variance is None else step.residual_variance
        fvu = error / variance.clamp_min(1e-12)  # of an exact target nothing is left to explain
        return self.coefficient * min(n_dead / wanted, 1.0) * fvu


def _dense_top_k(pre_acts: Float[Tensor, "batch n_dead"], k: int, signed: bool) -> Float[Tensor, "batch n_dead"]:
    sizes = pre_acts.abs() if signed else pre_acts.relu()
    indices = sizes.topk(k, dim=-1, sorted=False).indices
    values = (pre_acts if signed else sizes).gather(-1, indices)
    return torch.zeros_like(pre_acts).scatter(-1, indices, values)


def _variance(residual: Float[Tensor, "batch width"]) -> Scalar:
    """The mean over tokens of ||r - mean r||^2."""
    return (residual - residual.mean(0)).square().sum(-1).mean()

"""Where random directions are drawn: in the top-variance subspace of a site (arXiv 2508.16929).

What attention writes is of low rank: most directions drawn from the whole space see next to nothing of it, and
their latents die.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.choices import AUTO
from dictlearn.data import SiteStatistics
from dictlearn.lm.sites import is_attention_output
from dictlearn.types import DictlearnError, Site

SHARE = 0.99  # of the variance: init_subspace=auto at attention's outputs
Size = float | int  # a share of the variance, or a number of dimensions


def subspace_sizes(setting: Size | str | None, reads: Iterable[Site], model: PreTrainedModel) -> dict[str, Size]:
    """By name of the sites with directions in a subspace: with "auto", those that attention writes."""
    if setting == AUTO:
        return {site.name: SHARE for site in reads if is_attention_output(model, site)}
    assert not isinstance(setting, str)
    return {} if setting is None else {site.name: setting for site in reads}


class Subspace(NamedTuple):
    """An orthonormal basis, and the mean of the activations' variances along its directions."""

    basis: Float[Tensor, "d r"]
    variance: float


def subspaces(
    sizes: Mapping[str, Size], statistics: Mapping[str, SiteStatistics], layer_norm: bool
) -> dict[str, Subspace]:
    """Those of raw or of layer-normed activations, by site."""
    found = {}
    for site, size in sizes.items():
        covariance = statistics[site].layer_norm_covariance if layer_norm else statistics[site].covariance
        if covariance is None:
            raise DictlearnError(
                f"init_subspace={size} needs the covariance of the activations at {site}, which is not among the "
                "statistics that data.store has: use init_subspace=null, or let a run write another store."
            )
        found[site] = top_subspace(covariance, size)
    return found


def top_subspace(covariance: Float[Tensor, "d d"], size: Size) -> Subspace:
    """Of the directions of the largest variances: `size` of them, or as few as hold this share of all."""
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
    if isinstance(size, float):
        size = 1 + int((variances.cumsum(0) < size * variances.sum()).sum())
    return Subspace(directions[:, :size], float(variances[:size].mean()))

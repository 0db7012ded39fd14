"""How a dictionary's directions lie to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

DUPLICATE_COSINE = 0.9
CHUNK_ELEMENTS = 2**26  # of the [rows, n_latents] products


class Nearest(NamedTuple):
    """For each latent the one whose decoder row has the largest cosine with its own.

    A zero row has no direction: it has no nearest latent (cosine NaN, index -1) and is nobody's.
    """

    cosine: Float[Tensor, " n_latents"]
    latent: Int[Tensor, " n_latents"]

    @property
    def n_duplicates(self) -> int:
        """Latents whose decoder row has a cosine above 0.9 with another latent's."""
        return int((self.cosine > DUPLICATE_COSINE).sum())


@torch.no_grad()
def nearest(W_dec: Float[Tensor, "n_latents width"]) -> Nearest:
    """In chunks of rows, without an `[n_latents, n_latents]` tensor."""
    unit = torch.nn.functional.normalize(W_dec.float(), dim=-1)
    without = (W_dec == 0).all(-1)  # [n_latents]
    found = []
    chunk_rows = max(1, CHUNK_ELEMENTS // len(unit))
    for start in range(0, len(unit), chunk_rows):
        cosines = unit[start : start + chunk_rows] @ unit.T  # [rows, n_latents]
        cosines[:, without] = -torch.inf
        own = torch.arange(len(cosines), device=unit.device)
        cosines[own, start + own] = -torch.inf
        found.append(cosines.max(-1))
    cosine = torch.cat([best.values for best in found]).clamp(max=1.0)
    none = without | cosine.isinf()
    latent = torch.cat([best.indices for best in found])
    return Nearest(cosine.masked_fill(none, torch.nan), latent.masked_fill(none, -1))


@torch.no_grad()
def row_cosines(
    a: Float[Tensor, "n_latents width"], b: Float[Tensor, "n_latents width"]
) -> Float[Tensor, " n_latents"]:
    """Cosine of each row of `a` with the same row of `b`; NaN where one is zero."""
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

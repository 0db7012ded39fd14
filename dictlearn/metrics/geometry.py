"""How a dictionary's directions lie to each other."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DUPLICATE_COSINE = 0.9
CHUNK_ROWS = 1024  # bounds the [rows, n_latents] products


@torch.no_grad()
def duplicates(W_dec: Float[Tensor, "n_latents width"]) -> Bool[Tensor, " n_latents"]:
    """Latents whose decoder row has a cosine above 0.9 with another latent's; a zero row has no direction."""
    unit = torch.nn.functional.normalize(W_dec.float(), dim=-1)
    found = []
    for start in range(0, len(unit), CHUNK_ROWS):
        cosines = unit[start : start + CHUNK_ROWS] @ unit.T  # [rows, n_latents]
        own = torch.arange(len(cosines), device=unit.device)
        cosines[own, start + own] = -1.0
        found.append((cosines > DUPLICATE_COSINE).any(-1))
    return torch.cat(found)

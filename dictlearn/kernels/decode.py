"""Decode: the sum of the active rows of `W_dec`, each times its latent."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dictlearn.types import Latents, SparseLatents


def decode(latents: Latents, W_dec: Float[Tensor, "n_latents width"]) -> Float[Tensor, "*batch width"]:
    """`latents @ W_dec`. Compact latents touch only their own rows, forward and backward.

    The gradient of `W_dec` is summed per row without a `[nnz, width]` intermediate.
    """
    if not isinstance(latents, SparseLatents):
        return latents @ W_dec
    return F.embedding_bag(
        latents.indices,
        W_dec,
        latents.offsets,
        mode="sum",
        per_sample_weights=latents.values,
        include_last_offset=True,
    )  # [n_tokens, width]

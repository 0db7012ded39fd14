"""Products between tokens and the few rows of a weight that each of them uses; no `[n_tokens, k, d]` intermediate.

Both are pieces of the gradient of torch's embedding bag, whose bags are the tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

SUM = 0  # the mode of the bag


def row_products(
    x: Float[Tensor, "n_tokens d"], rows: Float[Tensor, "n_latents d"], indices: Int[Tensor, "n_tokens k"]
) -> Float[Tensor, "n_tokens k"]:
    """`x[t] . rows[indices[t, j]]`."""
    n_tokens, k = indices.shape
    starts, bag_of = _bags(n_tokens, k, x.device)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), rows, indices.flatten(), starts, bag_of, SUM
    )
    return products.view(n_tokens, k)


def scatter_outer(
    values: Float[Tensor, "n_tokens k"],
    indices: Int[Tensor, "n_tokens k"],
    x: Float[Tensor, "n_tokens d"],
    n_latents: int,
) -> Float[Tensor, "n_latents d"]:
    """`sum_t values[t, j] x[t]` added to row `indices[t, j]`."""
    n_tokens, k = indices.shape
    flat = indices.flatten()
    _, bag_of = _bags(n_tokens, k, x.device)
    bag_size = torch.full((n_tokens,), k, device=x.device)
    no_maxima = flat.new_empty(0)
    return torch.ops.aten._embedding_bag_dense_backward(
        x.contiguous(), flat, bag_of, bag_size, no_maxima, n_latents, False, SUM, values.flatten()
    )


def _bags(n_tokens: int, k: int, device: torch.device) -> tuple[Int[Tensor, " n_tokens"], Int[Tensor, " nnz"]]:
    """Where each bag starts, and the bag of each entry."""
    entries = torch.arange(n_tokens * k, device=device)
    return entries[::k].contiguous(), entries.div(k, rounding_mode="floor")

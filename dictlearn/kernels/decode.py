"""Decode: the sum of the active rows of `W_dec`, each times its latent."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictlearn.kernels import backend
from dictlearn.kernels.gather import row_products, scatter_outer
from dictlearn.types import Latents, SparseLatents


def decode(latents: Latents, W_dec: Float[Tensor, "n_latents width"]) -> Float[Tensor, "*batch width"]:
    """`latents @ W_dec`. Compact latents touch only their own rows, forward and backward.

    The gradient of `W_dec` is summed per row without a `[nnz, width]` intermediate. Values of another type, such as
    those of pre-activations under autocast, are converted.
    """
    if not isinstance(latents, SparseLatents):
        return latents @ W_dec
    values = latents.values.to(W_dec.dtype)
    return _Decode.apply(values, latents.indices, latents.offsets, W_dec)  # type: ignore[return-value]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, offsets, W_dec)
        return sum_of_rows(values, indices, offsets, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:  # type: ignore[override]
        values, indices, offsets, W_dec = ctx.saved_tensors
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = row_products(grads[0], W_dec, indices, offsets)
        if ctx.needs_input_grad[3]:
            grad_W = scatter_outer(values, indices, offsets, grads[0], len(W_dec))
        return grad_values, None, None, grad_W


def sum_of_rows(
    values: Float[Tensor, " nnz"], indices: Tensor, offsets: Tensor, rows: Float[Tensor, "n_latents width"]
) -> Float[Tensor, "n_tokens width"]:
    """Each token's `rows[indices]`, weighted by its values; not differentiable."""
    if backend.use_triton(values, rows):
        from dictlearn.kernels.triton import sparse

        return sparse.decode(values, indices, offsets, rows)
    return F.embedding_bag(
        indices, rows, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )  # [n_tokens, width]

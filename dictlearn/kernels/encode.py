"""Encoder product and top-k in one operation, with sparse weight gradients."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.kernels.decode import decode
from dictlearn.kernels.gather import row_products, scatter_outer
from dictlearn.kernels.select import top_columns
from dictlearn.types import SparseLatents

TILE_BYTES = 16 * 2**20  # of pre-activations in the proposing product: what stays in a processor's cache


def encode_top_k(
    x: Float[Tensor, "n_tokens d_in"],
    W_enc: Float[Tensor, "d_in n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    k: int,
) -> SparseLatents:
    """ReLU of the k largest of `x @ W_enc + b_enc` in each row (Gao et al. 2024), compact.

    Under autocast the product runs in the autocast type and only proposes k + max(8, k / 4) candidates; their
    pre-activations are computed again in float32 and the k largest of those are kept. Of equal ones among the
    candidates the lower index is kept.
    """
    values, indices = _EncodeTopK.apply(x, W_enc, b_enc, k)  # type: ignore[misc]
    offsets = torch.arange(0, indices.numel() + 1, k, device=x.device)
    return SparseLatents(values.flatten(), indices.flatten(), offsets, W_enc.shape[-1])


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = _select(x, W_enc, b_enc, k)  # [n_tokens, k]
        values = values.relu_()
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, W_enc, values, indices = ctx.saved_tensors
        grad = torch.where(values > 0, grads[0], 0.0)  # [n_tokens, k]
        grad_W = scatter_outer(grad, indices, x, W_enc.shape[-1]).T
        grad_b = torch.zeros_like(W_enc[0]).index_add_(0, indices.flatten(), grad.flatten())
        grad_x = None
        if ctx.needs_input_grad[0]:
            offsets = torch.arange(0, indices.numel() + 1, indices.shape[-1], device=x.device)
            sparse = SparseLatents(grad.flatten(), indices.flatten(), offsets, W_enc.shape[-1])
            grad_x = decode(sparse, W_enc.T.contiguous())
        return grad_x, grad_W, grad_b, None


def _select(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row, evaluated in the type of `x`, and where they are."""
    n_candidates = min(k + max(8, k // 4), W_enc.shape[-1])
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        exact, candidates = _propose(x.to(dtype), W_enc.to(dtype), b_enc.to(dtype), n_candidates)
        if dtype != x.dtype:
            exact = row_products(x, W_enc.T, candidates) + b_enc[candidates]
        values, order = exact.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), candidates.gather(-1, order[:, :k])


def _propose(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, m: int
) -> tuple[Float[Tensor, "n_tokens m"], Int[Tensor, "n_tokens m"]]:
    """The m largest pre-activations of each row and where they are, in tiles of rows that share one buffer.

    Ascending by index, so that a stable sort by value keeps the lower of two equal ones.
    """
    n_rows = max(1, TILE_BYTES // (W_enc.shape[-1] * x.element_size()))
    buffer = x.new_empty(min(n_rows, len(x)), W_enc.shape[-1])
    values, indices = [], []
    for rows in x.split(n_rows):
        pre_acts = torch.mm(rows, W_enc, out=buffer[: len(rows)]).add_(b_enc)
        indices.append(top_columns(pre_acts, m).sort(dim=-1).values)
        values.append(pre_acts.gather(1, indices[-1]))
    return torch.cat(values), torch.cat(indices)

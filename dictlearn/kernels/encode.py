"""Encoder product and top-k in one operation, with sparse weight gradients."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.kernels.decode import decode
from dictlearn.types import SparseLatents

CANDIDATE_ROWS = 1024  # rows per chunk of the exact evaluation; bounds its [rows, candidates, d_in] gather


def encode_top_k(
    x: Float[Tensor, "n_tokens d_in"],
    W_enc: Float[Tensor, "d_in n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    k: int,
) -> SparseLatents:
    """ReLU of the k largest of `x @ W_enc + b_enc` in each row (Gao et al. 2024), compact.

    Under autocast the product runs in the autocast type and only proposes k + max(8, k / 4) candidates; their
    pre-activations are computed again in float32 and the k largest of those are kept.
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
        grad_W = _scatter_outer(grad, indices, x, W_enc.shape[-1]).T
        grad_b = torch.zeros_like(W_enc[0]).index_add_(0, indices.flatten(), grad.flatten())
        grad_x = None
        if ctx.needs_input_grad[0]:
            offsets = torch.arange(0, indices.numel() + 1, indices.shape[-1], device=x.device)
            sparse = SparseLatents(grad.flatten(), indices.flatten(), offsets, W_enc.shape[-1])
            grad_x = decode(sparse, W_enc.T.contiguous())
        return grad_x, grad_W, grad_b, None


def _select(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row, evaluated in the type of `x`, and where they are."""
    if not torch.is_autocast_enabled(x.device.type):
        pre_acts = torch.addmm(b_enc, x, W_enc)  # [n_tokens, n_latents]
        values, indices = pre_acts.topk(k, dim=-1, sorted=False)
        return values, indices
    n_candidates = min(k + max(8, k // 4), W_enc.shape[-1])
    pre_acts = torch.addmm(b_enc, x, W_enc)  # autocast: [n_tokens, n_latents] in the lower precision
    candidates = pre_acts.topk(n_candidates, dim=-1, sorted=False).indices
    with torch.autocast(x.device.type, enabled=False):
        exact = _pre_acts_at(x, W_enc, b_enc, candidates)
        values, best = exact.topk(k, dim=-1, sorted=False)
    return values, candidates.gather(-1, best)


def _pre_acts_at(
    x: Float[Tensor, "n_tokens d_in"], W_enc: Tensor, b_enc: Tensor, indices: Int[Tensor, "n_tokens m"]
) -> Float[Tensor, "n_tokens m"]:
    """`x @ W_enc + b_enc` at the given latents only, in chunks of rows."""
    parts = []
    for rows, at in zip(x.split(CANDIDATE_ROWS), indices.split(CANDIDATE_ROWS), strict=True):
        directions = W_enc.T[at]  # [rows, m, d_in]
        parts.append(torch.bmm(directions, rows.unsqueeze(-1)).squeeze(-1) + b_enc[at])
    return torch.cat(parts) if parts else x.new_empty(indices.shape)


def _scatter_outer(
    grad: Float[Tensor, "n_tokens k"],
    indices: Int[Tensor, "n_tokens k"],
    x: Float[Tensor, "n_tokens d_in"],
    n_latents: int,
) -> Float[Tensor, "n_latents d_in"]:
    """`sum_t grad[t, j] x[t]` added to row `indices[t, j]`, without a `[n_tokens * k, d_in]` intermediate.

    This is the weight gradient of an embedding bag whose bags are the tokens and whose output gradient is `x`.
    """
    n_tokens, k = indices.shape
    flat = indices.flatten()
    bag_of = torch.arange(n_tokens, device=x.device).repeat_interleave(k)
    bag_size = torch.full((n_tokens,), k, device=x.device)
    no_maxima = flat.new_empty(0)
    return torch.ops.aten._embedding_bag_dense_backward(
        x.contiguous(), flat, bag_of, bag_size, no_maxima, n_latents, False, 0, grad.flatten()
    )

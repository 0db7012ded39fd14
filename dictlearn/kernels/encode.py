"""Encoder product and selection in one operation, with sparse weight gradients.

Under autocast the product runs in the autocast type and only proposes k + max(8, k / 4) candidates per token; their
pre-activations are computed again in float32, and the largest of those are kept, of equal ones the lower index. The
same holds for a float32 product that torch may round (TF32: torch.set_float32_matmul_precision).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictlearn.kernels import backend
from dictlearn.kernels.decode import sum_of_rows
from dictlearn.kernels.gather import row_products, scatter_outer
from dictlearn.kernels.select import top_columns, top_entries
from dictlearn.types import SparseLatents

TILE_BYTES = {"cpu": 2**24, "cuda": 2**27}  # of pre-activations at once: what stays in a processor's cache


def encode_top_k(
    x: Float[Tensor, "n_tokens d_in"],
    W_enc: Float[Tensor, "d_in n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    k: int,
) -> SparseLatents:
    """ReLU of the k largest of `x @ W_enc + b_enc` in each row (Gao et al. 2024), compact.

    Differentiable once. Raises ValueError for other shapes, and for a `k` that is not from 1 to n_latents.
    """
    return _encode(x, W_enc, b_enc, k, _of_each_token)


def encode_batch_top_k(
    x: Float[Tensor, "n_tokens d_in"],
    W_enc: Float[Tensor, "d_in n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    k: int,
) -> SparseLatents:
    """ReLU of the k * n_tokens largest of `x @ W_enc + b_enc` in the batch (Bussmann et al. 2024), compact.

    Differentiable once. Raises ValueError for other shapes, and for a `k` that is not from 1 to n_latents.
    """
    return _encode(x, W_enc, b_enc, k, _of_the_batch)


def encode_abs_top_k(
    x: Float[Tensor, "n_tokens d_in"],
    W_enc: Float[Tensor, "d_in n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    k: int,
) -> SparseLatents:
    """The k of `x @ W_enc + b_enc` with the largest absolute values in each row, signs kept, compact.

    Differentiable once. Raises ValueError for other shapes, and for a `k` that is not from 1 to n_latents.
    """
    return _encode(x, W_enc, b_enc, k, _of_each_token_by_size, signed=True)


def encode_group_max(
    x: Float[Tensor, "n_tokens d_in"],
    W_enc: Float[Tensor, "d_in n_latents"],
    b_enc: Float[Tensor, " n_latents"],
    k: int,
) -> SparseLatents:
    """ReLU of the largest of `x @ W_enc + b_enc` in each of k groups of successive latents, compact.

    Differentiable once. Raises ValueError for other shapes, and for a `k` that does not divide n_latents.
    """
    if k < 1 or W_enc.shape[-1] % k:
        raise ValueError(f"k must divide n_latents = {W_enc.shape[-1]}, got {k}")
    return _encode(x, W_enc, b_enc, k, _of_each_group)


class _Selected(NamedTuple):
    """Pre-activations, row-compressed as SparseLatents; the indices of a token ascend."""

    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " n_tokens_plus_1"]


Select = Callable[[Tensor, Tensor, Tensor, int, torch.dtype], _Selected]


def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, select: Select, signed: bool = False) -> SparseLatents:
    n_latents = W_enc.shape[-1]
    shapes = [list(t.shape) for t in (x, W_enc, b_enc)]
    if shapes != [[len(x), len(W_enc)], [len(W_enc), n_latents], [n_latents]] or len({x.dtype, W_enc.dtype}) > 1:
        raise ValueError(
            f"x, W_enc, b_enc must be [n_tokens, d_in], [d_in, n_latents], [n_latents], of one type; got {shapes}, "
            f"{x.dtype} and {W_enc.dtype}"
        )
    if not 0 < k <= n_latents:
        raise ValueError(f"k must be from 1 to n_latents = {n_latents}, got {k}")
    values, indices, offsets = _Encode.apply(x, W_enc, b_enc, k, select, signed)  # type: ignore[misc]
    return SparseLatents(values, indices, offsets, n_latents)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, select: Select, signed: bool
    ) -> _Selected:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            values, indices, offsets = select(x, W_enc, b_enc, k, dtype)
        if not signed:
            values = values.relu_()
        ctx.signed = signed
        ctx.save_for_backward(x, W_enc, values, indices, offsets)
        ctx.mark_non_differentiable(indices, offsets)
        return _Selected(values, indices, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, values, indices, offsets = ctx.saved_tensors
        grad = grads[0] if ctx.signed else torch.where(values > 0, grads[0], 0.0)  # [nnz]
        grad_W = scatter_outer(grad, indices, offsets, x, W_enc.shape[-1]).T
        grad_b = torch.zeros_like(W_enc[0]).index_add_(0, indices, grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = sum_of_rows(grad, indices, offsets, W_enc.T.contiguous())
        return grad_x, grad_W, grad_b, None, None, None


def _of_each_token(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> _Selected:
    m = min(k + max(8, k // 4), W_enc.shape[-1])
    values, candidates = _propose(x.to(dtype), W_enc.to(dtype), b_enc, m)  # [n_tokens, m]
    values = _exactly(values, candidates, x, W_enc, b_enc, dtype)
    values, places = top_columns(values, k)
    return _in_rows(values, candidates.gather(-1, places))


def _of_each_token_by_size(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> _Selected:
    m = min(k + max(8, k // 4), W_enc.shape[-1])
    candidates = _by_tiles(x.to(dtype), W_enc.to(dtype), lambda tile: top_columns(tile.add_(b_enc).abs_(), m)[1])
    values = _exactly(None, candidates, x, W_enc, b_enc, dtype)
    places = top_columns(values.abs(), k)[1]
    return _in_rows(values.gather(-1, places), candidates.gather(-1, places))


def _of_each_group(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> _Selected:
    n_tokens, n_latents = len(x), W_enc.shape[-1]
    per_group = n_latents // k
    m = 1 if _is_exact(x, dtype) else min(4, per_group)

    def largest(tile: Tensor) -> Int[Tensor, "n k_times_m"]:
        found = top_columns(tile.add_(b_enc).view(len(tile) * k, per_group), m)[1].view(len(tile), k, m)
        return (found + torch.arange(0, n_latents, per_group, device=x.device).unsqueeze(-1)).flatten(1)

    candidates = _by_tiles(x.to(dtype), W_enc.to(dtype), largest)  # [n_tokens, k * m]
    values = _exactly(None, candidates, x, W_enc, b_enc, dtype)
    best = values.view(n_tokens, k, m).max(-1, keepdim=True)
    chosen = candidates.view(n_tokens, k, m).gather(-1, best.indices)
    return _in_rows(best.values.squeeze(-1), chosen.squeeze(-1))


def _exactly(
    values: Float[Tensor, "n_tokens m"] | None,
    candidates: Int[Tensor, "n_tokens m"],
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    dtype: torch.dtype,
) -> Float[Tensor, "n_tokens m"]:
    """The pre-activations of the candidates; `values` where a product in `dtype` is as exact as can be."""
    if values is not None and _is_exact(x, dtype):
        return values
    offsets = _offsets(len(x), candidates.shape[-1], x.device)
    return row_products(x, W_enc.T, candidates.flatten(), offsets).view_as(candidates) + b_enc[candidates]


def _in_rows(values: Float[Tensor, "n_tokens k"], indices: Int[Tensor, "n_tokens k"]) -> _Selected:
    n_tokens, k = values.shape
    return _Selected(values.flatten(), indices.flatten(), _offsets(n_tokens, k, values.device))


def _by_tiles(
    x: Tensor, W_enc: Tensor, choose: Callable[[Float[Tensor, "n n_latents"]], Int[Tensor, "n m"]]
) -> Int[Tensor, "n_tokens m"]:
    """What `choose` finds in `x @ W_enc`, in tiles of rows that share one buffer, which it may overwrite."""
    n_rows = max(1, TILE_BYTES.get(x.device.type, 2**24) // (W_enc.shape[-1] * x.element_size()))
    buffer = x.new_empty(min(n_rows, len(x)), W_enc.shape[-1])
    return torch.cat([choose(torch.mm(rows, W_enc, out=buffer[: len(rows)])) for rows in x.split(n_rows)])


def _propose(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, m: int
) -> tuple[Float[Tensor, "n_tokens m"], Int[Tensor, "n_tokens m"]]:
    """The m largest pre-activations of each row and where they are, in tiles of rows that share one buffer.

    Ascending by index, so that the first of equal ones is the lower.
    """
    if backend.use_triton(x) and x.element_size() == 2:
        from dictlearn.kernels.triton import propose

        if propose.fits(W_enc.shape[-1], m):
            return propose.propose(x, W_enc.T, b_enc, m)
    values: list[Tensor] = []

    def largest(tile: Tensor) -> Tensor:
        found, indices = top_columns(tile, m, b_enc)
        values.append(found)
        return indices

    indices = _by_tiles(x, W_enc, largest)
    return torch.cat(values), indices


def _of_the_batch(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> _Selected:
    n_tokens, n_latents = len(x), W_enc.shape[-1]
    starts = torch.arange(n_tokens + 1, device=x.device) * n_latents  # of the rows, in the flattened batch
    m = k if _is_exact(x, dtype) else min(k + max(8, k // 4), n_latents)
    pre_acts = torch.mm(x.to(dtype), W_enc.to(dtype)).add_(b_enc.to(dtype)).flatten()
    candidates = top_entries(pre_acts, m * n_tokens)  # ascending: row by row
    if _is_exact(x, dtype):
        return _Selected(pre_acts[candidates], candidates % n_latents, torch.searchsorted(candidates, starts))
    indices = candidates % n_latents
    exact = row_products(x, W_enc.T, indices, torch.searchsorted(candidates, starts)) + b_enc[indices]
    kept = top_entries(exact, k * n_tokens)
    return _Selected(exact[kept], indices[kept], torch.searchsorted(candidates[kept], starts))


def _is_exact(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of `x` in `dtype` is all that its own type allows."""
    rounds = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return dtype == x.dtype and not rounds


def _offsets(n_tokens: int, k: int, device: torch.device) -> Int[Tensor, " n_tokens_plus_1"]:
    return torch.arange(0, n_tokens * k + 1, k, device=device)

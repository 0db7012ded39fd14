"""Products of tokens with the few rows of a weight that each of them uses; sums in float32, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.kernels.triton import on_the_device_of_the_first

BLOCK_ENTRIES = 16
WIDEST = 1024  # columns of one program
PIECE = 64  # entries of one latent that one program sums


@on_the_device_of_the_first
def decode(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_tokens_plus_1"],
    rows: Float[Tensor, "n_latents d"],
) -> Float[Tensor, "n_tokens d"]:
    """Each token's sum of `rows`, weighted by its values."""
    n_tokens, d = len(offsets) - 1, rows.shape[-1]
    values, indices, offsets, rows = (t.contiguous() for t in (values, indices, offsets, rows))
    out = torch.empty(n_tokens, d, dtype=values.dtype, device=values.device)
    if n_tokens:
        _decode[(n_tokens, _n_blocks(d))](
            values, indices, offsets, rows, out, d, BLOCK_ENTRIES=BLOCK_ENTRIES, BLOCK_D=_block(d), num_warps=4
        )
    return out


@on_the_device_of_the_first
def row_products(
    x: Float[Tensor, "n_tokens d"],
    rows: Float[Tensor, "n_latents d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_tokens_plus_1"],
) -> Float[Tensor, " nnz"]:
    """`x[t] . rows[indices[i]]` for each entry i of token t."""
    x, rows, indices, offsets = (t.contiguous() for t in (x, rows, indices, offsets))
    out = torch.empty(len(indices), dtype=x.dtype, device=x.device)
    if len(x):
        _row_products[(len(x),)](
            x, rows, indices, offsets, out, x.shape[-1],
            BLOCK_ENTRIES=BLOCK_ENTRIES, BLOCK_D=min(256, _block(x.shape[-1])), num_warps=4,
        )  # fmt: skip
    return out


@on_the_device_of_the_first
def scatter_outer(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_tokens_plus_1"],
    x: Float[Tensor, "n_tokens d"],
    n_latents: int,
) -> Float[Tensor, "n_latents d"]:
    """Row i is the sum of `values * x[token]` over the entries of latent i.

    The entries, sorted by latent, are summed in pieces of at most PIECE, so a latent of every token is many
    programs' work and not one's; a second kernel adds the later pieces of a latent to its first. Each row is
    written once, zeros included.
    """
    x, values = x.contiguous(), values.contiguous()
    nnz, d = len(indices), x.shape[-1]
    in_order, order = torch.sort(indices.int(), stable=True)
    token = torch.repeat_interleave(offsets.diff(), output_size=nnz)[order]
    latents = torch.arange(n_latents + 1, dtype=torch.int32, device=x.device)
    starts = torch.searchsorted(in_order, latents)  # [n_latents + 1]
    n_pieces = ((starts.diff() + PIECE - 1) // PIECE).clamp_min(1)
    ends = n_pieces.cumsum(0)  # of each latent's pieces
    most = n_latents + nnz // PIECE
    latent_of = torch.searchsorted(ends, torch.arange(most, device=x.device), right=True)
    out = torch.empty(n_latents, d, dtype=x.dtype, device=x.device)
    later = torch.empty(max(nnz // PIECE, 1), d, dtype=x.dtype, device=x.device)
    sizes = {"PIECE": PIECE, "BLOCK_D": _block(d)}
    if n_latents:
        _pieces[(most, _n_blocks(d))](
            values, order, token, x, starts, ends, latent_of, n_pieces, out, later, n_latents, d,
            BLOCK_ENTRIES=BLOCK_ENTRIES, **sizes, num_warps=4,
        )  # fmt: skip
        _add_later[(n_latents, _n_blocks(d))](ends, n_pieces, out, later, d, BLOCK_D=_block(d), num_warps=4)
    return out


def _block(d: int) -> int:
    return min(WIDEST, triton.next_power_of_2(d))


def _n_blocks(d: int) -> int:
    return triton.cdiv(d, _block(d))


@triton.jit
def _decode(
    values, indices, offsets, rows, out, d, BLOCK_ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, end, BLOCK_ENTRIES):
        entry = first + tl.arange(0, BLOCK_ENTRIES)
        latent = tl.load(indices + entry, mask=entry < end, other=0)
        value = tl.load(values + entry, mask=entry < end, other=0.0).to(tl.float32)
        inside = (entry < end)[:, None] & (column < d)[None, :]
        row = tl.load(rows + latent[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(value[:, None] * row, axis=0)
    tl.store(out + token * d + column, acc, mask=column < d)


@triton.jit
def _row_products(
    x, rows, indices, offsets, out, d, BLOCK_ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    for first in range(start, end, BLOCK_ENTRIES):
        entry = first + tl.arange(0, BLOCK_ENTRIES)
        latent = tl.load(indices + entry, mask=entry < end, other=0)
        acc = tl.zeros((BLOCK_ENTRIES,), tl.float32)
        for left in range(0, d, BLOCK_D):
            column = left + tl.arange(0, BLOCK_D)
            inside = (entry < end)[:, None] & (column < d)[None, :]
            row = tl.load(rows + latent[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
            token_x = tl.load(x + token * d + column, mask=column < d, other=0.0).to(tl.float32)
            acc += tl.sum(row * token_x[None, :], axis=1)
        tl.store(out + entry, acc, mask=entry < end)


@triton.jit
def _pieces(
    values, order, token, x, starts, ends, latent_of, n_pieces, out, later, n_latents, d,
    PIECE: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    latent = tl.load(latent_of + piece)
    if latent < n_latents:  # there are fewer pieces than programs
        first_piece = tl.load(ends + latent) - tl.load(n_pieces + latent)
        start = tl.load(starts + latent) + (piece - first_piece) * PIECE
        end = tl.minimum(start + PIECE, tl.load(starts + latent + 1))
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(start, end, BLOCK_ENTRIES):
            entry = first + tl.arange(0, BLOCK_ENTRIES)
            source = tl.load(order + entry, mask=entry < end, other=0)
            value = tl.load(values + source, mask=entry < end, other=0.0).to(tl.float32)
            row = tl.load(token + entry, mask=entry < end, other=0)
            inside = (entry < end)[:, None] & (column < d)[None, :]
            token_x = tl.load(x + row[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(value[:, None] * token_x, axis=0)
        if piece == first_piece:
            tl.store(out + latent * d + column, acc, mask=column < d)
        else:  # of the pieces before this one, latent + 1 are first ones
            tl.store(later + (piece - latent - 1) * d + column, acc, mask=column < d)


@triton.jit
def _add_later(ends, n_pieces, out, later, d, BLOCK_D: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    n = tl.load(n_pieces + latent)
    if n > 1:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        end = tl.load(ends + latent) - latent - 1  # where the later pieces of this latent end
        acc = tl.load(out + latent * d + column, mask=column < d, other=0.0).to(tl.float32)
        for i in range(end - n + 1, end):
            acc += tl.load(later + i * d + column, mask=column < d, other=0.0).to(tl.float32)
        tl.store(out + latent * d + column, acc, mask=column < d)

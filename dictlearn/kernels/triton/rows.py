"""Decoder rows that stay unit: the gradient's projection and the renormalisation, one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dictlearn.kernels.triton import on_the_device_of_the_first


@on_the_device_of_the_first
def project_rows_(grad: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Subtract from each row of `grad` its part along the unit row of `rows`; the squared norms that are left."""
    (n, d), squares = grad.shape, torch.empty(len(grad), dtype=torch.float32, device=grad.device)
    if n:
        _project[(n,)](grad, rows, squares, d, BLOCK=triton.next_power_of_2(d), num_warps=4)
    return squares


@on_the_device_of_the_first
def normalise_rows_(rows: Float[Tensor, "n d"]) -> None:
    """Divide each row by its norm."""
    n, d = rows.shape
    if n:
        _normalise[(n,)](rows, d, BLOCK=triton.next_power_of_2(d), num_warps=4)


@triton.jit
def _project(grad, rows, squares, d, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d
    column = tl.arange(0, BLOCK)
    g = tl.load(grad + start + column, mask=column < d, other=0.0).to(tl.float32)
    row = tl.load(rows + start + column, mask=column < d, other=0.0).to(tl.float32)
    g -= tl.sum(g * row, axis=0) * row
    tl.store(grad + start + column, g, mask=column < d)
    tl.store(squares + tl.program_id(0), tl.sum(g * g, axis=0))


@triton.jit
def _normalise(rows, d, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * d
    column = tl.arange(0, BLOCK)
    row = tl.load(rows + start + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(rows + start + column, row / tl.sqrt(tl.sum(row * row, axis=0)), mask=column < d)

"""Rows that stay unit: the projection of their gradient and their renormalisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.kernels import backend, native
from dictlearn.kernels.gather import row_products


def project_rows_(grad: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Subtract from each row of `grad` its part along the unit row of `rows`.

    Both contiguous. Returns the squared norms of what is left.
    """
    _check_contiguous(grad, rows)
    if backend.use_triton(grad, rows):
        from dictlearn.kernels.triton import rows as kernels

        return kernels.project_rows_(grad, rows)
    if backend.use_native(grad, rows):
        return native.project_rows_(grad, rows)
    one_each = torch.arange(len(rows) + 1, device=rows.device)
    along = row_products(grad, rows, one_each[:-1], one_each)  # [n]
    grad.addcmul_(along.unsqueeze(-1), rows, value=-1)
    return torch.linalg.vector_norm(grad, dim=-1).square()


def normalise_rows_(rows: Float[Tensor, "n d"]) -> None:
    """Divide each row by its norm; contiguous."""
    _check_contiguous(rows)
    if backend.use_triton(rows):
        from dictlearn.kernels.triton import rows as kernels

        kernels.normalise_rows_(rows)
    elif backend.use_native(rows):
        native.normalise_rows_(rows)
    else:
        rows.div_(rows.norm(dim=-1, keepdim=True))


def _check_contiguous(*tensors: Tensor) -> None:
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("rows that are changed in place must be contiguous")

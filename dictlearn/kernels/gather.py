"""Products between tokens and the few rows of a weight that each of them uses; no `[nnz, d]` intermediate.

In plain torch both are pieces of the gradient of its embedding bag, whose bags are the tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.kernels import backend, native

SUM = 0  # the mode of the bag


def row_products(
    x: Float[Tensor, "n_tokens d"],
    rows: Float[Tensor, "n_latents d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_tokens_plus_1"],
) -> Float[Tensor, " nnz"]:
    """`x[t] . rows[indices[i]]` for each entry i of token t, which owns `offsets[t]:offsets[t + 1]`.

    Indices are from 0 to n_latents - 1, which only the compiled code checks; not differentiable.
    """
    if backend.use_triton(x, rows):
        from dictlearn.kernels.triton import sparse

        return sparse.row_products(x, rows, indices, offsets)
    if backend.use_native(x, rows):
        return native.row_products(
            x.contiguous(), rows.contiguous(), indices.long().contiguous(), offsets.long().contiguous()
        )
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), rows, indices, offsets[:-1], _token_of(indices, offsets), SUM
    )


def scatter_outer(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_tokens_plus_1"],
    x: Float[Tensor, "n_tokens d"],
    n_latents: int,
) -> Float[Tensor, "n_latents d"]:
    """Row j is the sum of `values[i] * x[t]` over the entries i with `indices[i] == j`, t the token of i.

    Indices are from 0 to n_latents - 1, which only the compiled code checks; not differentiable.
    """
    if backend.use_triton(values, x):
        from dictlearn.kernels.triton import sparse

        return sparse.scatter_outer(values, indices, offsets, x, n_latents)
    if backend.use_native(values, x):
        return native.scatter_outer(
            values.contiguous(), indices.long().contiguous(), offsets.long().contiguous(), x.contiguous(), n_latents
        )
    no_maxima = indices.new_empty(0)
    return torch.ops.aten._embedding_bag_dense_backward(
        x.contiguous(),
        indices,
        _token_of(indices, offsets),
        offsets.diff(),
        no_maxima,
        n_latents,
        False,
        SUM,
        values.contiguous(),
    )


def _token_of(indices: Int[Tensor, " nnz"], offsets: Int[Tensor, " n_tokens_plus_1"]) -> Int[Tensor, " nnz"]:
    return torch.repeat_interleave(offsets.diff(), output_size=len(indices))

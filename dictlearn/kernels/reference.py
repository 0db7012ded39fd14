"""What every operation computes, dense and slow: the truth that the tests hold the others to."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.types import SparseLatents


def encode_top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Float[Tensor, "n_tokens n_latents"]:
    """ReLU of each row's k largest pre-activations, of equal ones the first; differentiable."""
    pre_acts = x @ W_enc + b_enc
    order = pre_acts.detach().sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(pre_acts).scatter(-1, order[:, :k], 1.0)
    return (pre_acts * kept).relu()


def encode_batch_top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Float[Tensor, "n_tokens n_latents"]:
    """ReLU of the k * n_tokens largest pre-activations of the batch, of equal ones the first; differentiable."""
    pre_acts = x @ W_enc + b_enc
    order = pre_acts.detach().flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros_like(pre_acts).flatten().scatter(0, order[: k * len(x)], 1.0)
    return (pre_acts * kept.view_as(pre_acts)).relu()


def encode_abs_top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Float[Tensor, "n_tokens n_latents"]:
    """Each row's k pre-activations of largest absolute value, of equal ones the first; differentiable."""
    pre_acts = x @ W_enc + b_enc
    order = pre_acts.detach().abs().sort(dim=-1, descending=True, stable=True).indices
    return pre_acts * torch.zeros_like(pre_acts).scatter(-1, order[:, :k], 1.0)


def encode_group_max(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Float[Tensor, "n_tokens n_latents"]:
    """ReLU of the largest of each of k groups of successive pre-activations, of equal ones the first."""
    pre_acts = (x @ W_enc + b_enc).unflatten(-1, (k, -1))
    best = pre_acts.detach().sort(dim=-1, descending=True, stable=True).indices[..., :1]
    return (pre_acts * torch.zeros_like(pre_acts).scatter(-1, best, 1.0)).flatten(1).relu()


def decode(latents: SparseLatents, W_dec: Tensor) -> Float[Tensor, "n_tokens width"]:
    return latents.to_dense() @ W_dec


def top_columns(values: Tensor, m: int) -> Int[Tensor, "n m"]:
    """Ascending, of equal ones the first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :m].sort(dim=-1).values


def top_entries(values: Tensor, m: int) -> Int[Tensor, " m"]:
    return values.sort(descending=True, stable=True).indices[:m].sort().values


def row_products(x: Tensor, rows: Tensor, indices: Tensor, offsets: Tensor) -> Float[Tensor, " nnz"]:
    token = torch.repeat_interleave(offsets.diff(), output_size=len(indices))
    return (x @ rows.T)[token, indices]


def scatter_outer(
    values: Tensor, indices: Tensor, offsets: Tensor, x: Tensor, n_latents: int
) -> Float[Tensor, "n_latents d"]:
    token = torch.repeat_interleave(offsets.diff(), output_size=len(indices))
    dense = values.new_zeros(len(x), n_latents).index_put((token, indices), values, accumulate=True)
    return dense.T @ x


def project_rows_(grad: Tensor, rows: Tensor) -> Float[Tensor, " n"]:
    grad -= (grad * rows).sum(-1, keepdim=True) * rows
    return grad.square().sum(-1)


def normalise_rows_(rows: Tensor) -> None:
    rows /= rows.square().sum(-1, keepdim=True).sqrt()

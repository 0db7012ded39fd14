"""The largest entries of each row, and of a whole batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.kernels import backend, native

MOST_PER_GROUP = 64
FEW = 1024
NATIVE_TYPES = (torch.float32, torch.bfloat16)


def top_columns(
    values: Float[Tensor, "n width"], m: int, bias: Float[Tensor, " width"] | None = None
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The `m` largest of each row of `values + bias`, and where they are, ascending.

    Of equal ones the first are found, but of more than FEW columns plain torch takes any. `values` may be
    overwritten.
    """
    if backend.use_native(values, types=NATIVE_TYPES):
        indices = native.top_columns(values.contiguous(), m, None if bias is None else bias.float().contiguous())
        found = values.gather(1, indices)
        return found if bias is None else found + bias[indices].to(found.dtype), indices
    if bias is not None:
        values.add_(bias)
    if values.shape[-1] <= FEW:
        found = values.sort(dim=-1, descending=True, stable=True).indices[:, :m]
    else:
        found = _unordered(values, m)
    indices = found.sort(dim=-1).values
    return values.gather(1, indices), indices


def _unordered(values: Float[Tensor, "n width"], m: int) -> Int[Tensor, "n m"]:
    """Where the m largest are.

    They lie in the m groups with the largest maxima, so most of a wide row is read once, for the maxima of its
    groups, and the rest is a choice among few. Columns j, j + n_groups, j + 2 n_groups... are one group, so that
    the maxima are taken between contiguous vectors.
    """
    n, width = values.shape
    per_group = MOST_PER_GROUP
    while per_group > 1 and (width % per_group or width < 4 * m * per_group):
        per_group //= 2
    if per_group == 1:
        return values.topk(m, dim=-1, sorted=False).indices
    n_groups = width // per_group
    grouped = values.view(n, per_group, n_groups)
    best = grouped.amax(1).topk(m, dim=-1, sorted=False).indices  # [n, m]
    candidates = grouped.gather(2, best.unsqueeze(1).expand(-1, per_group, -1)).flatten(1)  # [n, per_group * m]
    found = _unordered(candidates, m)
    return best.gather(1, found % m) + found.div(m, rounding_mode="floor") * n_groups


def top_entries(values: Float[Tensor, " n"], m: int) -> Int[Tensor, " m"]:
    """Where the `m` largest are, ascending; of equal ones the first.

    A threshold is found and what is above it collected: by groups as in `top_columns`, on a GPU by histograms.
    """
    if m == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    if backend.use_triton(values):
        from dictlearn.kernels.triton import threshold

        return threshold.top_entries(values, m)
    if backend.use_native(values, types=NATIVE_TYPES):
        return native.top_entries(values.contiguous(), m)
    values = values.nan_to_num(torch.inf, torch.inf, -torch.inf)  # NaN is found, and seen
    least = values[_unordered(values.unsqueeze(0), m)[0]].min()
    found = (values >= least).nonzero().squeeze(-1)
    at = values[found] == least
    n_spare = len(found) - m  # equal ones that are too many
    return found[~(at & (at.flip(0).cumsum(0).flip(0) <= n_spare))]

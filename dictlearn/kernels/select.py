"""The largest entries of each row."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

MOST_PER_GROUP = 64


def top_columns(values: Float[Tensor, "n width"], m: int) -> Int[Tensor, "n m"]:
    """Where the `m` largest of each row are, in no order. Exact: which of several equal ones are found is open.

    The m largest lie in the m groups with the largest maxima, so most of a wide row is read once, for the maxima
    of its groups, and the rest is a choice among few. Columns j, j + n_groups, j + 2 n_groups... are one group, so
    that the maxima are taken between contiguous vectors.
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
    found = top_columns(candidates, m)
    return best.gather(1, found % m) + found.div(m, rounding_mode="floor") * n_groups

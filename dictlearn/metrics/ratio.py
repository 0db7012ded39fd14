"""A ratio of two sums over tokens: its value, its standard error, its course over the positions of a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

PerToken = Float[Tensor, "n_tokens n_values"]


class Places(NamedTuple):
    """Where tokens stand: their row in the data set and their position in it, `[n_tokens]` each."""

    rows: Int[Tensor, " n_tokens"]
    positions: Int[Tensor, " n_tokens"]

    def select(self, index: Any) -> Places:
        """The places of some of the tokens."""
        return Places(self.rows[index], self.positions[index])


class TokenRatio(Metric):
    """sum over tokens of `top` / sum over tokens of `bottom`; a mean over tokens is the case bottom = 1.

    Of `n_values` ratios at once. What is kept are the two sums of every row and of every position, so that memory
    does not grow with the tokens of a row.

    The tokens of a row depend on each other, rows are drawn independently. So the standard error treats the row as
    the unit (clustered by row): of the ratio R it is sqrt(G / (G - 1) sum_g i_g^2) over the G rows with tokens,
    with i_g = (top_g - R bottom_g) / sum bottom the influence of row g (Cochran 1977, Sampling Techniques, 2.11
    and 6.4). One row has none: NaN.
    """

    full_state_update = False
    row_top: Tensor  # [n_rows, n_values]
    row_bottom: Tensor  # [n_rows, n_values]
    position_top: Tensor  # [ctx, n_values]
    position_bottom: Tensor  # [ctx, n_values]

    def __init__(self, n_rows: int, ctx: int, n_values: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for axis, n_groups in (("row", n_rows), ("position", ctx)):
            for part in ("top", "bottom"):
                zeros = torch.zeros(n_groups, n_values, dtype=torch.float64)
                self.add_state(f"{axis}_{part}", zeros, dist_reduce_fx="sum")

    def update(self, places: Places, top: PerToken, bottom: PerToken | None = None) -> None:
        top = top.double()
        bottom = torch.ones_like(top) if bottom is None else bottom.double()
        self.row_top = self.row_top.index_add(0, places.rows, top)
        self.row_bottom = self.row_bottom.index_add(0, places.rows, bottom)
        self.position_top = self.position_top.index_add(0, places.positions, top)
        self.position_bottom = self.position_bottom.index_add(0, places.positions, bottom)

    def compute(self) -> Float[Tensor, "*n_values"]:
        """The ratios; NaN where the sum of `bottom` is zero."""
        return self.ratio

    @property
    def ratio(self) -> Float[Tensor, " n_values"]:
        return self.row_top.sum(0) / self.row_bottom.sum(0)

    @property
    def influence(self) -> Float[Tensor, "n_rows n_values"]:
        """By how much each row moves the ratio, in first order; that of a sum of ratios is the sum of theirs."""
        return (self.row_top - self.ratio * self.row_bottom) / self.row_bottom.sum(0)

    @property
    def n_rows_seen(self) -> int:
        """Rows with tokens."""
        return int((self.row_bottom != 0).any(-1).sum())

    @property
    def stderr(self) -> Float[Tensor, " n_values"]:
        return clustered_stderr(self.influence, self.n_rows_seen)

    @property
    def by_position(self) -> Float[Tensor, "ctx n_values"]:
        """The ratio of the tokens at each position; NaN where there are none."""
        return self.position_top / self.position_bottom


def clustered_stderr(influence: Float[Tensor, "n_rows *values"], n_rows_seen: int) -> Float[Tensor, "*values"]:
    """The standard error of what rows move by `influence`: also of paired differences, means and other smooth
    functions of ratios over the same rows, whose influences combine by the chain rule. NaN for a single row.
    """
    if n_rows_seen < 2:
        return torch.full_like(influence[0], torch.nan)
    return (n_rows_seen / (n_rows_seen - 1) * influence.square().sum(0)).sqrt()

"""How many latents a token has, and how often each latent fires. Exact: every counter is an int64.

A latent is active where its value is not zero; a TopK code that keeps a zero has fewer than k active latents.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from dictlearn.types import Latents, SparseLatents

QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}

DENSE = 10  # a latent that is active on more than one token in so many is dense


class L0(Metric):
    """Number of active latents per token: mean, median, 5th and 95th percentile (linear interpolation)."""

    full_state_update = False
    n_tokens_with: Tensor  # [n_latents + 1]: tokens with exactly that many active latents

    def __init__(self, n_latents: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        counts = torch.zeros(n_latents + 1, dtype=torch.int64)
        self.add_state("n_tokens_with", counts, dist_reduce_fx="sum")

    def update(self, latents: Latents) -> None:
        """`latents`: a sparse code, or dense `[*, n_latents]`."""
        if isinstance(latents, SparseLatents):
            running = _zero_first((latents.values != 0).cumsum(0))  # [nnz + 1]
            l0 = running[latents.offsets].diff()  # [n_tokens]
        else:
            l0 = (latents != 0).sum(-1).flatten()  # [n_tokens]
        self.n_tokens_with = self.n_tokens_with.index_add(0, l0, torch.ones_like(l0))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        tokens_up_to = self.n_tokens_with.cumsum(0)
        sizes = torch.arange(len(self.n_tokens_with), device=self.n_tokens_with.device)
        # in integers first: a float sum over 1e9 tokens would lose the last digits
        mean = (sizes * self.n_tokens_with).sum().double() / tokens_up_to[-1]
        return {"mean": mean} | {name: _quantile(tokens_up_to, q) for name, q in QUANTILES.items()}


class FiringCounts(Metric):
    """On how many tokens each latent is active; a latent that is active on none of them is dead."""

    full_state_update = False
    n_fired: Tensor  # [n_latents]
    n_tokens: Tensor  # []

    def __init__(self, n_latents: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("n_fired", torch.zeros(n_latents, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, latents: Latents) -> None:
        """`latents`: a sparse code, or dense `[*, n_latents]`."""
        if isinstance(latents, SparseLatents):
            active = (latents.values != 0).long()
            self.n_fired = self.n_fired.index_add(0, latents.indices.long(), active)
            self.n_tokens = self.n_tokens + latents.n_tokens
        else:
            active = (latents != 0).flatten(0, -2)  # [n_tokens, n_latents]
            self.n_fired = self.n_fired + active.sum(0)
            self.n_tokens = self.n_tokens + len(active)

    def compute(self) -> dict[str, Int[Tensor, ""] | Float[Tensor, ""]]:
        """`n_dead`, `frac_dead`: latents that never fired. `frac_dense`: share of the latents that are active on
        more than a tenth of the tokens; `mass_dense`: the share of all firings that is theirs.
        """
        n_dead = (self.n_fired == 0).sum()
        dense = self.n_fired * DENSE > self.n_tokens
        return {
            "n_dead": n_dead,
            "frac_dead": n_dead.double() / len(self.n_fired),
            "frac_dense": dense.double().mean(),
            "mass_dense": self.n_fired[dense].sum().double() / self.n_fired.sum(),
        }

    @property
    def density(self) -> Float[Tensor, " n_latents"]:
        """Share of tokens on which each latent is active, float64."""
        return self.n_fired.double() / self.n_tokens


def _zero_first(values: Int[Tensor, " n"]) -> Int[Tensor, " n_plus_1"]:
    return torch.cat([values.new_zeros(1), values])


def _quantile(tokens_up_to: Int[Tensor, " n_sizes"], q: float) -> Float[Tensor, ""]:
    """Of the multiset with this cumulative histogram: what `numpy.quantile` gives for its values."""
    rank = q * (tokens_up_to[-1].double() - 1)
    # the value of rank r is the first size that more than r tokens do not exceed
    low, high = (torch.searchsorted(tokens_up_to, r.long(), right=True).double() for r in (rank, rank.ceil()))
    nan = torch.full_like(low, torch.nan)
    return torch.where(tokens_up_to[-1] > 0, low + (rank - rank.floor()) * (high - low), nan)

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

# thresholds of a density by name: 1 / value is the density, so that counts are compared in integers
OVER = {"1e-1": 10, "1e-2": 100}
BELOW = {"1e-5": 10**5, "1e-6": 10**6, "1e-7": 10**7}


def n_active(latents: Latents) -> Int[Tensor, " n_tokens"]:
    """Active latents of each token of a sparse code, or of a dense one `[*, n_latents]`."""
    if isinstance(latents, SparseLatents):
        running = _zero_first((latents.values != 0).cumsum(0))  # [nnz + 1]
        return running[latents.offsets].diff()
    return (latents != 0).sum(-1).flatten()


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
        l0 = n_active(latents)
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
        """`n_dead`, `frac_dead`: latents that never fired.

        By threshold of the density: `n_below_*`, how many latents are below it, dead ones included; `frac_over_*`,
        which share of the latents is above it, and `mass_over_*`, which share of all firings is theirs.
        """
        n_dead = (self.n_fired == 0).sum()
        found = {"n_dead": n_dead, "frac_dead": n_dead.double() / len(self.n_fired)}
        for name, one_in in BELOW.items():
            found[f"n_below_{name}"] = (self.n_fired * one_in < self.n_tokens).sum()
        for name, one_in in OVER.items():
            over = self.n_fired * one_in > self.n_tokens
            found[f"frac_over_{name}"] = over.double().mean()
            found[f"mass_over_{name}"] = self.n_fired[over].sum().double() / self.n_fired.sum()
        return found

    @property
    def density(self) -> Float[Tensor, " n_latents"]:
        """Share of tokens on which each latent is active, float64."""
        return self.n_fired.double() / self.n_tokens


class LatentValues(FiringCounts):
    """Firing counts, and how large the latents are where they are active, in the units of the code."""

    total: Tensor  # [n_latents]
    largest: Tensor  # [n_latents]
    magnitude: Tensor  # []

    def __init__(self, n_latents: int, **kwargs: Any) -> None:
        super().__init__(n_latents, **kwargs)
        self.add_state("total", torch.zeros(n_latents, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.full((n_latents,), -torch.inf), dist_reduce_fx="max")
        self.add_state("magnitude", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Latents) -> None:
        if not isinstance(latents, SparseLatents):
            latents = SparseLatents.from_dense(latents.flatten(0, -2))
        super().update(latents)
        values, indices = latents.values, latents.indices.long()
        self.total = self.total.index_add(0, indices, values.double())
        of_active = torch.where(values != 0, values, -torch.inf).to(self.largest.dtype)
        self.largest = self.largest.scatter_reduce(0, indices, of_active, "amax")
        self.magnitude = self.magnitude + values.abs().sum(dtype=torch.float64)

    @property
    def mean(self) -> Float[Tensor, " n_latents"]:
        """Mean value of each latent over the tokens on which it is active; NaN for a dead one."""
        return self.total / self.n_fired

    @property
    def max(self) -> Float[Tensor, " n_latents"]:
        """Largest value of each latent; NaN for a dead one."""
        return self.largest.masked_fill(self.n_fired == 0, torch.nan)

    @property
    def l1_mean(self) -> Float[Tensor, ""]:
        """Mean over tokens of sum |latent|."""
        return self.magnitude / self.n_tokens


def _zero_first(values: Int[Tensor, " n"]) -> Int[Tensor, " n_plus_1"]:
    return torch.cat([values.new_zeros(1), values])


def _quantile(tokens_up_to: Int[Tensor, " n_sizes"], q: float) -> Float[Tensor, ""]:
    """Of the multiset with this cumulative histogram: what `numpy.quantile` gives for its values."""
    rank = q * (tokens_up_to[-1].double() - 1)
    # the value of rank r is the first size that more than r tokens do not exceed
    low, high = (torch.searchsorted(tokens_up_to, r.long(), right=True).double() for r in (rank, rank.ceil()))
    nan = torch.full_like(low, torch.nan)
    return torch.where(tokens_up_to[-1] > 0, low + (rank - rank.floor()) * (high - low), nan)

"""The fraction of variance unexplained, and the squared error behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95}
Targets = Float[Tensor, "n_tokens n_sites d_out"]


def merge_moments(parts: Float[Tensor, "n_parts n_sites packed"]) -> Float[Tensor, "n_sites packed"]:
    """The moments of a union of token sets (Chan, Golub and LeVeque 1979, for any number of sets).

    A row is `[n, m2, mean...]`, packed so that one reduction merges ranks: the number of tokens, their sum of
    squares about their mean, their mean. Unlike a difference of raw sums this stays right when the mean is far
    larger than the spread.
    """
    n, m2, mean = parts[..., 0], parts[..., 1], parts[..., 2:]
    total = n.sum(0)
    pooled = (n / total.clamp(min=1)).unsqueeze(-1).mul(mean).sum(0)  # [n_sites, d_out]
    between = (n * (mean - pooled).square().sum(-1)).sum(0)  # [n_sites]
    return torch.cat([total.unsqueeze(-1), (m2.sum(0) + between).unsqueeze(-1), pooled], dim=-1)


class Variance(Metric):
    """How much of the target's variance a reconstruction misses; y target, y_hat reconstruction, raw units.

    - `fvu`: sum ||y - y_hat||^2 / sum ||y - mean(y)||^2 with the mean over the whole data set (1 - R^2);
      `fve` = 1 - fvu. Not bounded by 1.
    - `fvu_centred`: the same with mean(y - y_hat) taken off the error: blind to a constant offset, and what other
      programs call 1 - explained variance.
    - `mse_per_token`: mean over tokens of ||y - y_hat||^2; `mse_per_dim` = mse_per_token / d_out.
    """

    full_state_update = False
    moments: Tensor  # [n_sites, d_out + 2]: n, sum of squares about the mean, mean
    sse: Tensor  # [n_sites]
    error_sum: Tensor  # [n_sites, d_out]

    def __init__(self, n_sites: int, d_out: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.d_out = d_out
        moments = torch.zeros(n_sites, d_out + 2, dtype=torch.float64)
        self.add_state("moments", moments, dist_reduce_fx=merge_moments)
        self.add_state("sse", torch.zeros(n_sites, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("error_sum", torch.zeros(n_sites, d_out, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, target: Targets, recon: Targets) -> None:
        y = target.double()
        n = torch.full_like(self.sse, len(y))  # [n_sites]
        mean = y.sum(0) / max(len(y), 1)  # [n_sites, d_out]
        m2 = (y - mean).square().sum((0, 2))  # [n_sites]
        batch = torch.cat([n.unsqueeze(-1), m2.unsqueeze(-1), mean], dim=-1)
        self.moments = merge_moments(torch.stack([self.moments, batch]))
        error = y - recon.double()
        self.sse = self.sse + error.square().sum((0, 2))
        self.error_sum = self.error_sum + error.sum(0)

    def compute(self) -> dict[str, Float[Tensor, " n_sites"]]:
        n, m2 = self.moments[:, 0], self.moments[:, 1]
        fvu = self.sse / m2
        mse_per_token = self.sse / n
        return {
            "fvu": fvu,
            "fve": 1 - fvu,
            "fvu_centred": (self.sse - self.error_sum.square().sum(-1) / n) / m2,
            "mse_per_token": mse_per_token,
            "mse_per_dim": mse_per_token / self.d_out,
        }

    @property
    def mean(self) -> Float[Tensor, "n_sites d_out"]:
        """Mean of the target over the tokens seen, float64."""
        return self.moments[:, 2:]


class TokenFVU(Metric):
    """The distribution over tokens of ||y - y_hat||^2 / ||y - mean(y)||^2, with the mean over the whole data set.

    Unlike `fvu`, not ruled by the few tokens of the largest norm. The 5th, 50th and 95th percentile (linear
    interpolation) and the mean (1 - mean is the "explained variance" of older reports). A token exactly at the mean
    has no FVU and is left out. Keeps one float32 per token and site.
    """

    full_state_update = False
    fvu: list[Tensor] | Tensor  # [n_tokens, n_sites] each; one tensor after a reduction over ranks

    def __init__(self, n_sites: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_sites = n_sites
        self.add_state("fvu", [], dist_reduce_fx="cat")

    def update(self, sse: Float[Tensor, "n_tokens n_sites"], spread: Float[Tensor, "n_tokens n_sites"]) -> None:
        """`sse` ||y - y_hat||^2 and `spread` ||y - mean(y)||^2 of each token."""
        assert isinstance(self.fvu, list)
        self.fvu.append((sse / spread).masked_fill(spread == 0, torch.nan).float())

    def compute(self) -> dict[str, Float[Tensor, " n_sites"]]:
        """`fvu_token_p5`, `fvu_token_median`, `fvu_token_p95`, `fvu_token_mean`; NaN where no token has one."""
        together = self.fvu if isinstance(self.fvu, Tensor) else torch.cat(self.fvu)
        sites = together.cpu().double().T.numpy()  # [n_sites, n_tokens]
        kept = [site[~np.isnan(site)] for site in sites]
        found = {
            f"fvu_token_{name}": [np.quantile(site, q) if len(site) else np.nan for site in kept]
            for name, q in QUANTILES.items()
        }
        found["fvu_token_mean"] = [site.mean() if len(site) else np.nan for site in kept]
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}

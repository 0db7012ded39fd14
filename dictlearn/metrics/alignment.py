"""Direction and length of a reconstruction against its target."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from dictlearn.metrics.variance import Targets


class Alignment(Metric):
    """Whether reconstructions y_hat point along their targets y, and whether they are too short.

    - `cosine`: mean over tokens of <y, y_hat> / (||y|| ||y_hat||). A token whose target or reconstruction is
      zero has no cosine: it is left out of the mean and counted in `n_zero_norm`.
    - `relative_bias`: sum ||y_hat||^2 / sum <y, y_hat>; 1 is unbiased, below 1 is shrinkage (Rajamanoharan et
      al. 2024, Improving Dictionary Learning with Gated Sparse Autoencoders, eq. 10, with global sums).
    """

    full_state_update = False
    cosine_sum: Tensor  # [n_sites]
    n_cosine: Tensor  # [n_sites]
    n_zero_norm: Tensor  # [n_sites]
    dot: Tensor  # [n_sites]
    recon_sq: Tensor  # [n_sites]

    def __init__(self, n_sites: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("cosine_sum", "dot", "recon_sq"):
            self.add_state(name, torch.zeros(n_sites, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("n_cosine", "n_zero_norm"):
            self.add_state(name, torch.zeros(n_sites, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, target: Targets, recon: Targets) -> None:
        y, y_hat = target.double(), recon.double()
        dot = (y * y_hat).sum(-1)  # [n_tokens, n_sites]
        recon_sq = y_hat.square().sum(-1)
        norms = (y.square().sum(-1) * recon_sq).sqrt()
        cosine = torch.where(norms > 0, dot / norms, 0)
        self.cosine_sum = self.cosine_sum + cosine.sum(0)
        self.n_cosine = self.n_cosine + (norms > 0).sum(0)
        self.n_zero_norm = self.n_zero_norm + (norms == 0).sum(0)
        self.dot = self.dot + dot.sum(0)
        self.recon_sq = self.recon_sq + recon_sq.sum(0)

    def compute(self) -> dict[str, Float[Tensor, " n_sites"] | Int[Tensor, " n_sites"]]:
        return {
            "cosine": self.cosine_sum / self.n_cosine,
            "relative_bias": self.recon_sq / self.dot,
            "n_zero_norm": self.n_zero_norm,
        }

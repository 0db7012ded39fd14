"""Latents against the features that are known to be there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

MATCHED = 0.95  # cosine


class Matching(NamedTuple):
    """One latent for each feature and at most one feature for each latent, so that their cosines sum to the most.

    Where there are fewer latents than features, the features that are left have latent -1 and cosine 0.
    """

    latent: Int[Tensor, " n_features"]
    cosine: Float[Tensor, " n_features"]  # of the feature and its latent; float64
    sign: Float[Tensor, " n_features"]  # of the latent where it stands for the feature; 0 without one
    max_cosine: Float[Tensor, " n_features"]  # with any latent


@torch.no_grad()
def match(
    features: Float[Tensor, "n_features d"], W_dec: Float[Tensor, "n_latents d"], signed: bool = False
) -> Matching:
    """The assignment of largest total cosine of directions (Hungarian algorithm; Crouse 2016 as in SciPy).

    A zero row has cosine 0 with everything. `signed`: latents may be negative, so each has two directions.
    """
    unit, rows = (torch.nn.functional.normalize(part.double().cpu(), dim=-1) for part in (features, W_dec))
    cosines = unit @ rows.T  # [n_features, n_latents]
    size = cosines.abs() if signed else cosines
    found = linear_sum_assignment(size.numpy(), maximize=True)
    feature, latent = (torch.from_numpy(places) for places in found)
    chosen = torch.full((len(unit),), -1).index_copy(0, feature, latent)
    cosine, sign = torch.zeros(2, len(unit), dtype=torch.float64).unbind()
    cosine[feature] = size[feature, latent]
    sign[feature] = 1 - 2 * (cosines[feature, latent] < 0).double() if signed else 1.0
    parts = Matching(chosen, cosine, sign, size.max(-1).values)
    return Matching(*(part.to(features.device) for part in parts))


class Detection(Metric):
    """How a latent fires against the feature it stands for, feature by feature.

    - `precision`: of the tokens where the latent is active, the share where the feature fires; NaN if never active.
    - `recall`: of the tokens where the feature fires, the share where the latent is active; NaN if it never fires.
    - `f1`: their harmonic mean, 2 both / (active + fires).
    - `shrinkage`: mean of latent value x decoder norm / true value over the tokens where both are; 1 is unbiased.
    """

    full_state_update = False
    n_fires: Tensor  # [n_features]
    n_active: Tensor  # [n_features]
    n_both: Tensor  # [n_features]
    ratio: Tensor  # [n_features]
    n_tokens: Tensor  # []

    def __init__(self, n_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("n_fires", "n_active", "n_both"):
            self.add_state(name, torch.zeros(n_features, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ratio", torch.zeros(n_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, true: Float[Tensor, "n_tokens n_features"], found: Float[Tensor, "n_tokens n_features"]
    ) -> None:
        """`true` values of the features, and what their latents write along their own directions."""
        fires, active = true > 0, found > 0
        both = fires & active
        self.n_fires = self.n_fires + fires.sum(0)
        self.n_active = self.n_active + active.sum(0)
        self.n_both = self.n_both + both.sum(0)
        self.ratio = self.ratio + torch.where(both, found.double() / true.double(), 0.0).sum(0)
        self.n_tokens = self.n_tokens + len(true)

    def compute(self) -> dict[str, Float[Tensor, "*n_features"]]:
        return self.by_feature

    @property
    def by_feature(self) -> dict[str, Float[Tensor, " n_features"]]:
        return {
            "precision": self.n_both / self.n_active.double(),
            "recall": self.n_both / self.n_fires.double(),
            "f1": 2 * self.n_both / (self.n_active + self.n_fires).double(),
            "shrinkage": self.ratio / self.n_both,
        }

    @property
    def true_l0(self) -> Float[Tensor, ""]:
        """Mean number of features that fire at a token."""
        return self.n_fires.sum().double() / self.n_tokens

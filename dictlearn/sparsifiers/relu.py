"""ReLU with an L1 penalty weighted by decoder norms (Anthropic, April 2024 update)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.types import DictlearnError, Scalar, SparseLatents, Step


class ReLU(Sparsifier):
    """`l1` times the mean over tokens of sum_i latent_i ||W_dec_i||, in units of the target's spread.

    The spread is the root of `step.variance`, so `l1` means the same at every activation scale, width and batch
    size. Weighting by the norm lets the decoder be free: growing a row cannot cheat the penalty.
    """

    norm_weighted: ClassVar[bool] = True

    def __init__(self, l1: float) -> None:
        super().__init__()
        if isinstance(l1, bool) or not isinstance(l1, int | float) or not 0 <= l1 < math.inf:
            raise DictlearnError(f"sparsifier.l1 must be a finite number, at least 0, got {l1!r}.")
        self.l1 = l1

    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        return pre_acts.relu()

    def penalty(self, step: Step) -> Scalar:
        spread = step.variance.mean().sqrt()
        norms = step.dictionary.decoder_norms()  # [n_latents]
        if isinstance(step.latents, SparseLatents):
            total = (step.latents.values * norms[step.latents.indices]).sum()
        else:
            total = (step.latents.sum(0, dtype=norms.dtype) * norms).sum()
        return self.l1 * total / (len(step.x) * spread)

    def config(self) -> dict[str, Any]:
        return {"l1": self.l1}

    @classmethod
    def tiny(cls) -> ReLU:
        return cls(l1=0.1)

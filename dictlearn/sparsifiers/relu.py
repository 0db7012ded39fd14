"""ReLU with a penalty weighted by decoder norms: L1 (Anthropic, April 2024 update), or L_p with p annealed from 1
(Karvonen et al. 2024, arXiv 2408.00113).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.checks import check_number
from dictlearn.ramp import Ramp, check_ramp, ramp_factor
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.types import DictlearnError, Scalar, SparseLatents, Step

N_JUMPS = 10  # of p on its way from 1
SMALLEST = 1e-3  # of the target's spread: below, |u|^p is nearly linear, so that its slope stays finite


class ReLU(Sparsifier):
    """`l1` times the mean over tokens of sum_i u_i^p, u_i = latent_i ||W_dec_i|| in units of the target's spread.

    The spread is the root of `step.variance`, so `l1` means the same at every activation scale, width and batch
    size. Weighting by the norm (`Dictionary.penalty_norms`) lets the decoder be free: growing a row cannot cheat
    the penalty.

    Args:
        l1: weight of the penalty.
        p: exponent at the end of the run. Below 1 it comes down from 1 in ten jumps, the first at `anneal_from`;
            at each the weight is rescaled, so that the penalty of that batch stays what it was.
        anneal_from: share of the run before p moves.
        ramp: over which `l1` rises from 0: null, a number of steps, a share of the run, or `run`.
    """

    norm_weighted = True
    per_latent = True
    leaves_positive = False

    scale: Float[Tensor, ""]  # of the weight, from the jumps of p so far

    def __init__(self, l1: float, p: float = 1.0, anneal_from: float = 0.4, ramp: Ramp = None) -> None:
        super().__init__()
        check_number("sparsifier.l1", l1)
        check_ramp("sparsifier.ramp", ramp)
        for name, value, lowest in (("p", p, "above 0"), ("anneal_from", anneal_from, "of at least 0")):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1 or (name == "p" and value == 0):
                raise DictlearnError(f"sparsifier.{name} must be a number {lowest} and at most 1, got {value!r}.")
        self.l1, self.p, self.anneal_from, self.ramp = l1, p, anneal_from, ramp
        self.per_token = p == 1  # a jump looks at the whole batch
        self.factor, self.p_now, self.p_before = 1.0, float(p), float(p)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        return pre_acts.relu()

    def penalty(self, step: Step) -> Scalar:
        spread = step.variance.mean().sqrt()
        weights = step.dictionary.penalty_norms() / spread  # [n_latents]
        if self.p_now != self.p_before:
            with torch.no_grad():
                before, now = (self._mean(step, weights, p) for p in (self.p_before, self.p_now))
                self.scale *= torch.where((before > 0) & (now > 0), before / now, 1.0)  # none may be active
            self.p_before = self.p_now
        return self.l1 * self.factor * self.scale * self._mean(step, weights, self.p_now)

    @staticmethod
    def _mean(step: Step, weights: Float[Tensor, " n_latents"], p: float) -> Scalar:
        """The mean over tokens of sum_i u_i^p."""
        latents = step.latents
        if isinstance(latents, SparseLatents):
            total = _power(latents.values * weights[latents.indices], p).sum()
        elif p == 1:
            total = (latents.sum(0, dtype=weights.dtype) * weights).sum()
        else:
            total = _power(latents * weights, p).sum()
        return total / len(step.x)

    def at(self, step: int, n_steps: int) -> None:
        self.factor = ramp_factor(self.ramp, step, n_steps)
        self.p_now, self.p_before = self._p_at(step, n_steps), self._p_at(max(step - 1, 0), n_steps)

    def _p_at(self, step: int, n_steps: int) -> float:
        """1 before `anneal_from` of the run, then down to p in equal jumps over what is left."""
        first = self.anneal_from * n_steps
        if step < first:
            return 1.0
        jump = min(N_JUMPS, 1 + int(N_JUMPS * (step - first) / max(n_steps - first, 1)))
        return 1.0 - (1.0 - self.p) * jump / N_JUMPS

    def for_inference(self) -> ReLU:
        return ReLU(self.l1)

    def config(self) -> dict[str, Any]:
        annealed = {} if self.p == 1 else {"p": self.p, "anneal_from": self.anneal_from}
        return {"l1": self.l1, **annealed, **({} if self.ramp is None else {"ramp": self.ramp})}

    @classmethod
    def tiny(cls) -> ReLU:
        return cls(l1=0.1)


def _power(values: Tensor, p: float) -> Tensor:
    """(u + s)^p - s^p with s = SMALLEST, exactly 0 where u is."""
    return values if p == 1 else SMALLEST**p * (p * (values / SMALLEST).log1p()).expm1()

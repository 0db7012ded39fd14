"""Learning-rate schedules: the optimiser step, from 0, to a factor of the peak rate."""

from __future__ import annotations

from dataclasses import dataclass

from dictlearn.choices import is_count
from dictlearn.types import DictlearnError


@dataclass(frozen=True)
class WarmupDecay:
    """Linear warm-up, constant, then linear decay to zero.

    Args:
        warmup_steps: steps of the warm-up; at most a twentieth of the run.
        decay: share of the run that decays, at its end.
    """

    warmup_steps: int
    decay: float

    def __post_init__(self) -> None:
        if not is_count(self.warmup_steps, 0):
            raise DictlearnError(
                f"schedule.warmup_steps must be a whole number of at least 0, got {self.warmup_steps!r}."
            )
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 <= self.decay <= 1:
            raise DictlearnError(f"schedule.decay must be a number in [0, 1], got {self.decay!r}.")

    def factor(self, step: int, n_steps: int) -> float:
        """In (0, 1] for every `step` in [0, n_steps)."""
        warmup = min(self.warmup_steps, n_steps // 20)
        decay_steps = round(self.decay * n_steps)
        rising = min(1.0, (step + 1) / (warmup + 1))
        falling = min(1.0, (n_steps - step) / (decay_steps + 1)) if decay_steps else 1.0
        return min(rising, max(falling, 0.0))

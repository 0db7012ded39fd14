"""Learning-rate schedules: the optimiser step, from 0, to a factor of the peak rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from dictlearn.choices import is_count
from dictlearn.types import DictlearnError


@runtime_checkable
class Schedule(Protocol):
    """A factor of the peak rate in (0, 1], at every `step` in [0, n_steps)."""

    def factor(self, step: int, n_steps: int) -> float: ...


@dataclass(frozen=True)
class WarmupDecay:
    """Linear warm-up, constant, then linear decay to zero.

    Args:
        warmup_steps: steps of the warm-up; at most a twentieth of the run.
        decay: share of the run that decays, at its end; None: the optimizer's own, by `settled`.
    """

    warmup_steps: int
    decay: float | None

    def __post_init__(self) -> None:
        if not is_count(self.warmup_steps, 0):
            raise DictlearnError(
                f"schedule.warmup_steps must be a whole number of at least 0, got {self.warmup_steps!r}."
            )
        number = isinstance(self.decay, int | float) and not isinstance(self.decay, bool)
        if self.decay is not None and not (number and 0 <= self.decay <= 1):
            raise DictlearnError(f"schedule.decay must be null or a number in [0, 1], got {self.decay!r}.")

    def factor(self, step: int, n_steps: int) -> float:
        assert self.decay is not None, "see `settled`"
        warmup = min(self.warmup_steps, n_steps // 20)
        decay_steps = round(self.decay * n_steps)
        rising = min(1.0, (step + 1) / (warmup + 1))
        falling = min(1.0, (n_steps - step) / (decay_steps + 1)) if decay_steps else 1.0
        return min(rising, max(falling, 0.0))


def settled(schedule: Schedule, decay: float) -> Schedule:
    """`schedule`, with the optimizer's `decay` where it leaves that open."""
    if isinstance(schedule, WarmupDecay) and schedule.decay is None:
        return replace(schedule, decay=decay)
    return schedule

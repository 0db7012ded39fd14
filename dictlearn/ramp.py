"""How a coefficient or a k moves over a run: `null`, over a number of steps, or over the whole `run`."""

from __future__ import annotations

from dictlearn.choices import is_count
from dictlearn.types import DictlearnError

RUN = "run"
Ramp = int | str | None


def check_ramp(name: str, ramp: Ramp) -> None:
    """Raise DictlearnError unless `ramp` is null, a whole number of steps, or `run`."""
    if ramp is not None and ramp != RUN and not is_count(ramp, 1):
        raise DictlearnError(f"{name} must be null, a whole number of steps from 1, or {RUN}, got {ramp!r}.")


def ramp_factor(ramp: Ramp, step: int, n_steps: int) -> float:
    """In (0, 1], linear, at optimiser step `step` from 0; it is 1 from the last step of the ramp on.

    A ramp never takes more steps than the run has.
    """
    if ramp is None:
        return 1.0
    length = n_steps if ramp == RUN or int(ramp) > n_steps else int(ramp)
    return min(1.0, (step + 1) / length)

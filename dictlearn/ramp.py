"""How a coefficient or a k moves: at once (`null`), over a number of steps, a share of the run, or all (`run`)."""

from __future__ import annotations

from dictlearn.choices import is_count
from dictlearn.types import DictlearnError

RUN = "run"
Ramp = int | float | str | None


def check_ramp(name: str, ramp: Ramp) -> None:
    """Raise DictlearnError unless `ramp` is null, a whole number of steps, a share of the run, or `run`."""
    is_share = isinstance(ramp, float) and 0 < ramp < 1
    if ramp is not None and ramp != RUN and not is_share and not is_count(ramp, 1):
        raise DictlearnError(
            f"{name} must be null, a whole number of steps from 1, a share of the run between 0 and 1, or {RUN}, "
            f"got {ramp!r}."
        )


def ramp_factor(ramp: Ramp, step: int, n_steps: int) -> float:
    """In (0, 1], linear, at optimiser step `step` from 0; it is 1 from the last step of the ramp on.

    A ramp never takes more steps than the run has, and one at least.
    """
    if ramp is None:
        return 1.0
    if ramp == RUN:
        length = n_steps
    elif isinstance(ramp, float):
        length = max(1, round(ramp * n_steps))
    else:
        length = min(int(ramp), n_steps)
    return min(1.0, (step + 1) / length)

"""What some settings may be; a module of its own, so that the library needs no configuration system."""

from __future__ import annotations

from typing import Any

NORMALISE = ("mean_norm", "none", "layer_norm")
STREAMS = ("shuffled", "sequences")
PRECISIONS = ("32-true", "bf16-mixed")
ACCELERATORS = ("cpu", "gpu")
AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")


def is_count(value: Any, least: int) -> bool:
    """A whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """A number, not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_subspace(value: Any) -> bool:
    """What init_subspace may be: null, auto, a share of the variance, or a number of dimensions."""
    share = isinstance(value, float) and 0 < value < 1
    return value is None or value == AUTO or share or is_count(value, 1)

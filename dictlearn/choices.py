"""What some settings may be; a module of its own, so that the library needs no configuration system."""

from __future__ import annotations

from typing import Any

NORMALISE = ("mean_norm", "none", "layer_norm")
STREAMS = ("shuffled", "sequences")
PRECISIONS = ("32-true", "bf16-mixed")
ACCELERATORS = ("cpu", "gpu")
DTYPES = ("float32", "bfloat16", "float16")


def is_count(value: Any, least: int) -> bool:
    """A whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

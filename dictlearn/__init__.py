"""dictlearn: train, check, publish and load sparse dictionaries of a language model's activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dictlearn.hub import load
    from dictlearn.splice import attach

__version__ = "0.1.0"
__all__ = ["__version__", "attach", "load"]


def __getattr__(name: str) -> Any:
    """Import the public doors on first use: `import dictlearn` alone does not import torch."""
    if name == "attach":
        from dictlearn.splice import attach

        return attach
    if name == "load":
        from dictlearn.hub import load

        return load
    raise AttributeError(f"module 'dictlearn' has no attribute {name!r}")

"""dictlearn: train, check, publish and load sparse dictionaries of a language model's activations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dictlearn.circuits.intervention_run import intervene
    from dictlearn.circuits.interventions import Ablate, Scale, Set, Steer
    from dictlearn.hub import list_dictionaries as list
    from dictlearn.hub import load
    from dictlearn.hub.publish import push
    from dictlearn.splice import attach

__version__ = "0.1.0"
__all__ = ["Ablate", "Scale", "Set", "Steer", "__version__", "attach", "intervene", "list", "load", "push"]

_DOORS = {
    "Ablate": ("dictlearn.circuits.interventions", "Ablate"),
    "Scale": ("dictlearn.circuits.interventions", "Scale"),
    "Set": ("dictlearn.circuits.interventions", "Set"),
    "Steer": ("dictlearn.circuits.interventions", "Steer"),
    "attach": ("dictlearn.splice", "attach"),
    "intervene": ("dictlearn.circuits.intervention_run", "intervene"),
    "list": ("dictlearn.hub", "list_dictionaries"),
    "load": ("dictlearn.hub", "load"),
    "push": ("dictlearn.hub.publish", "push"),
}


def __getattr__(name: str) -> Any:
    """Import the public doors on first use: `import dictlearn` alone does not import torch."""
    if name not in _DOORS:
        raise AttributeError(f"module 'dictlearn' has no attribute {name!r}")
    module, door = _DOORS[name]
    return getattr(import_module(module), door)


def __dir__() -> tuple[str, ...]:
    return (*__all__,)

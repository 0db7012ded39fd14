"""The door to all methods of scoring nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from dictlearn.circuits.cuts import cuts_of
from dictlearn.circuits.methods.base import N_ROWS, Method
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM, model_of
from dictlearn.registry import lookup
from dictlearn.types import DictlearnError

PACKAGE = "dictlearn.circuits.methods"


def node_scores(
    model: LM | PreTrainedModel,
    dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary],
    batch: PairBatch,
    metric: str | None = None,
    method: str | Mapping[str, Any] | Method = "gradient",
    positions: str = "each",
    n_rows: int = N_ROWS,
) -> dict[str, NodeValues]:
    """How much every node of the dictionaries matters for the metric: estimates of m(patched) - m(clean).

    Args:
        dictionaries: those without a name go by their write sites.
        metric: one of metrics.py; None: that of the pairs.
        method: the name of a file in circuits/methods, {name: settings}, or a method itself.
        positions: a node for "each" position, or one for "all" of them.
        n_rows: pairs in one forward.

    Raises DictlearnError for unknown names, and dictionaries that cannot stand in a model together.
    """
    own = model_of(model)
    pairs = (batch if metric is None else replace(batch, metric=metric)).to(own.device)
    return method_of(method).scores(own, cuts_of(own, dictionaries), pairs, positions, n_rows)


def method_of(method: str | Mapping[str, Any] | Method) -> Method:
    """The method of a name, with its defaults, or of {name: settings}; raises DictlearnError for unknown ones."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str | Mapping) or (not isinstance(method, str) and len(method) != 1):
        raise DictlearnError(f"method must be a name, or one name with its settings, got {method!r}.")
    name, settings = (method, None) if isinstance(method, str) else next(iter(method.items()))
    return with_settings(PACKAGE, name, settings)


def with_settings(package: str, name: str, settings: Any) -> Any:
    """An object of a kind in `package` with what a user wrote: {setting: value}, or None for the defaults.

    Raises DictlearnError for an unknown kind or setting.
    """
    if not isinstance(settings, Mapping | None) or not all(isinstance(key, str) for key in settings or {}):
        raise DictlearnError(
            f"Settings are names with values, as in {{{name}: {{name: value}}}}, got {settings!r}."
        )
    try:
        return lookup(package, name)(**(settings or {}))
    except TypeError as error:
        raise DictlearnError(f"{name}: {error}.") from None

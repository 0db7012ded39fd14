"""The door to all methods of scoring nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from dictlearn.circuits.cuts import cuts_of
from dictlearn.circuits.methods.base import Method
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM
from dictlearn.registry import lookup

PACKAGE = "dictlearn.circuits.methods"


def node_scores(
    model: LM | PreTrainedModel,
    dictionaries: Mapping[str, Dictionary],
    batch: PairBatch,
    metric: str | None = None,
    method: str | Method = "gradient",
    positions: str = "each",
) -> dict[str, NodeValues]:
    """How much every node of the dictionaries matters for the metric: estimates of m(patched) - m(clean).

    Args:
        metric: one of metrics.py; None: that of the pairs.
        method: the name of a file in circuits/methods, with its defaults, or one with other settings.
        positions: a node for "each" position, or one for "all" of them.

    Raises DictlearnError for unknown names, and dictionaries that cannot stand in a model together.
    """
    own = model.model if isinstance(model, LM) else model
    chosen = method if isinstance(method, Method) else lookup(PACKAGE, method)()
    pairs = (batch if metric is None else replace(batch, metric=metric)).to(own.device)
    return chosen.scores(own, cuts_of(own, dictionaries), pairs, positions)

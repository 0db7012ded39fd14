"""Nodes: the parts of a model's activations that a circuit keeps or takes away.

A node of a dictionary is one latent at one position of the prompt, or at all of them; beside those, each write site
has one error node per position: all that neither the latents nor a skip path write there (bias and error).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from dictlearn.checks import check_choice
from dictlearn.types import DictlearnError

ORDERS = ("absolute", "signed")
NO_SCORE = "No node has a score: no latent is active, or none is another one on clean than on patch prompts."


class NodeValues(NamedTuple):
    """One value for each node of one dictionary: a score, or whether a circuit has it.

    `latents` [n_positions, n_latents], `errors` [n_writes, n_positions]; `n_positions` is 1 where a node stands for
    all positions.
    """

    latents: Tensor
    errors: Tensor


Nodes: TypeAlias = Mapping[str, NodeValues]  # by the dictionary's name


class Ranking:
    """Nodes in the order in which circuits take them up.

    A score estimates what patching the node does to the metric, m(patched) - m(clean): nodes that carry the
    behaviour have negative ones. Nodes of score zero, such as latents that are never active, are no candidates.

    Args:
        scores: by dictionary.
        order: "absolute", or "signed": those that lower the metric most come first.
        errors: whether error nodes are ranked; else there are latents alone.

    Raises DictlearnError where no node has a score, or one is not a finite number.
    """

    def __init__(self, scores: Nodes, order: str = "absolute", errors: bool = True) -> None:
        check_choice("order", order, ORDERS)
        self._like = {name: NodeValues(*map(torch.zeros_like, nodes)) for name, nodes in scores.items()}
        flat = _flat(scores, errors)
        if not flat.isfinite().all():
            bad = [name for name, nodes in scores.items() if not all(part.isfinite().all() for part in nodes)]
            raise DictlearnError(
                f"The scores of nodes must be finite numbers. Those of {', '.join(bad)} are not: the dictionary is "
                "not, or the model's gradients are not."
            )
        (self._candidates,) = flat.nonzero(as_tuple=True)
        if not len(self._candidates):
            raise DictlearnError(NO_SCORE)
        key = -flat if order == "signed" else flat.abs()
        best = key[self._candidates].sort(descending=True, stable=True).indices
        self._order: Int[Tensor, " n_candidates"] = self._candidates[best]
        self._errors = errors

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self._order)

    def first(self, n: int) -> dict[str, NodeValues]:
        """The circuit of the best `n` candidates and nothing else; no error nodes, where these are not ranked.

        Raises DictlearnError where there are fewer.
        """
        if not 0 <= n <= len(self):
            raise DictlearnError(f"A circuit has 0 to {len(self)} nodes, which is how many have a score, got {n}.")
        flat = torch.zeros_like(_flat(self._like, self._errors), dtype=torch.bool)
        flat[self._order[:n]] = True
        return _unflat(flat, self._like, self._errors)


def everything(scores: Nodes, latents: bool = True, errors: bool = True) -> dict[str, NodeValues]:
    """The circuit that has all latents, or none, and all error nodes, or none."""
    return {
        name: NodeValues(
            torch.full_like(nodes.latents, latents, dtype=torch.bool),
            torch.full_like(nodes.errors, errors, dtype=torch.bool),
        )
        for name, nodes in scores.items()
    }


def complement(circuit: Nodes) -> dict[str, NodeValues]:
    """All nodes that are not in a circuit."""
    return {name: NodeValues(~nodes.latents, ~nodes.errors) for name, nodes in circuit.items()}


def with_errors(circuit: Nodes, kept: bool) -> dict[str, NodeValues]:
    """A circuit with all error nodes, or with none."""
    return {
        name: nodes._replace(errors=torch.full_like(nodes.errors, kept, dtype=torch.bool))
        for name, nodes in circuit.items()
    }


def _flat(scores: Nodes, errors: bool) -> Tensor:
    parts = [part for nodes in scores.values() for part in (nodes.latents, nodes.errors)[: 1 + errors]]
    return torch.cat([part.flatten() for part in parts])


def _unflat(flat: Tensor, like: Nodes, errors: bool) -> dict[str, NodeValues]:
    made: dict[str, NodeValues] = {}
    for name, nodes in like.items():
        n = nodes.latents.numel()
        latents, flat = flat[:n].view_as(nodes.latents), flat[n:]
        own = torch.zeros_like(nodes.errors, dtype=torch.bool)
        if errors:
            n = own.numel()
            own, flat = flat[:n].view_as(own), flat[n:]
        made[name] = NodeValues(latents, own)
    return made

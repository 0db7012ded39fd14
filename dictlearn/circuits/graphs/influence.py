"""How much each node matters for the logits of an attribution graph, and how much of that latents explain.

As in Ameisen et al. (2025): A is the matrix of absolute edges, each row divided by its sum over latents, errors and
embeddings (biases, the same for every prompt, and latents that are no nodes are left out). With w the weights of
the logits (probabilities, or the same for chosen ones),

    influence = w (A + A^2 + ...) = w ((I - A)^-1 - I)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dictlearn.circuits.graphs.graph import Graph
from dictlearn.types import DictlearnError

CHUNK = 64  # rows of edges in one piece of work
PIECE = 2**20  # values of edges
Sources = Float[Tensor, " n_sources"]  # latents, errors and embeddings


class Scores(NamedTuple):
    """Of a whole graph, between 0 and 1; neither is the faithfulness of a circuit.

    replacement: the share of embeddings in the influence of embeddings and errors.
    completeness: the share of what comes into a node that does not come from errors; the mean over nodes weighted
        by influence (of logits: by their weight), embeddings and errors being counted as complete.
    """

    replacement: float
    completeness: float


def shares(edges: Float[Tensor, "n_targets n_sources"]) -> Float[Tensor, "n_targets n_sources"]:
    """Absolute edges, each row divided by its sum; a row of zeros stays."""
    sizes = edges.abs()
    sums = sizes.sum(-1, keepdim=True)
    return sizes / sums.masked_fill(sums == 0, 1)


def influence(
    edges: Float[Tensor, "n_targets n_sources"],
    weights: Float[Tensor, " n_targets"],
    source_of: Int[Tensor, " n_targets"],
) -> Sources:
    """w (A + A^2 + ...), without a copy of the edges.

    Args:
        edges: of the rows that are known; A is `shares(edges)`.
        weights: w, by row.
        source_of: the column of the node that a row is the target of; -1: of a logit.

    Raises DictlearnError where A has a cycle.
    """
    found, is_source = edges.new_zeros(edges.shape[1]), source_of >= 0
    sums = torch.cat([part.abs().sum(-1) for part in edges.split(CHUNK)])
    inverse = torch.where(sums > 0, 1 / sums, 0)
    for _ in range(len(edges) + 1):
        scaled = weights * inverse
        flow = sum((w @ e.abs() for w, e in _with_weight(scaled, edges)), start=torch.zeros_like(found))
        if not flow.any():
            return found
        found += flow
        weights = torch.where(is_source, flow[source_of], 0)
    raise DictlearnError(
        "Influence needs a graph without cycles: its edges lead from earlier layers to later ones."
    )


def _with_weight(weights: Tensor, edges: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of rows that have any weight."""
    for some, own in zip(weights.split(CHUNK), edges.split(CHUNK), strict=True):
        if some.any():
            yield some, own


def edges_between(graph: Graph) -> Float[Tensor, "n_targets n_sources"]:
    """Edges without the columns of biases and of other latents."""
    return graph.edges[:, : graph.places("bias").start]


def source_of(graph: Graph) -> Int[Tensor, " n_targets"]:
    """The column of each row's node; -1 for logits."""
    latents = torch.arange(graph.n_latents, device=graph.edges.device)
    return torch.cat([latents, latents.new_full((graph.n_logits,), -1)])


def logit_weights(graph: Graph) -> Float[Tensor, " n_targets"]:
    """How much logits count, by row; 0 for latents."""
    weights = graph.weights.to(graph.edges.dtype)
    return torch.cat([weights.new_zeros(graph.n_latents), weights])


def node_influence(graph: Graph) -> Sources:
    """The influence of each latent, error and embedding."""
    return influence(edges_between(graph), logit_weights(graph), source_of(graph))


def graph_scores(graph: Graph) -> Scores:
    """Replacement and completeness score of a graph as it was made, not pruned. With fewer latents than are active
    (`max_latents`) they are those of the nodes alone, and lower.
    """
    edges, weights = edges_between(graph), logit_weights(graph)
    found = influence(edges, weights, source_of(graph))
    errors, embeddings = found[graph.places("error")].sum(), found[graph.places("embedding")].sum()
    of_errors = shares(edges)[:, graph.places("error")].sum(-1)
    by_row = torch.cat([found[: graph.n_latents], weights[graph.n_latents :]])
    complete = ((1 - of_errors) * by_row).sum() + errors + embeddings
    return Scores(float(embeddings / (embeddings + errors)), float(complete / (found.sum() + weights.sum())))


class Kept(NamedTuple):
    """What pruning keeps: `nodes` by source (latents, errors, embeddings), `edges` `[n_targets, n_sources]`."""

    nodes: Bool[Tensor, " n_sources"]
    edges: Bool[Tensor, "n_targets n_sources"]


def prune(graph: Graph, node_share: float = 0.8, edge_share: float = 0.98) -> Kept:
    """The nodes and edges that matter most, as circuit-tracer prunes.

    Nodes of the smallest set with `node_share` of all influence are kept, embeddings and logits always; of the
    edges between them the smallest set with `edge_share` of their scores (share in the target, times the target's
    influence, of logits their weight, in what is left). Then latents without an edge in or out, and errors without
    one out, are dropped.

    Raises DictlearnError for shares outside [0, 1].
    """
    for name, share in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0 <= share <= 1:
            raise DictlearnError(f"{name} must be between 0 and 1, got {share}.")
    latents, embeddings = slice(0, graph.n_latents), graph.places("embedding")
    edges, weights, sources = edges_between(graph), logit_weights(graph), source_of(graph)
    nodes = _largest(influence(edges, weights, sources), node_share)
    nodes[embeddings] = True
    left = edges * _between(nodes, graph)  # the one copy of all edges: scores are made in its place
    by_row = weights + _by_row(influence(left, weights, sources), graph)
    sums = left.abs_().sum(-1, keepdim=True)
    kept = left.div_(sums.masked_fill_(sums == 0, 1)) != 0
    kept &= _largest(left.mul_(by_row.unsqueeze(-1)).flatten(), edge_share).view_as(left)
    del left
    while True:
        used = kept.any(0)
        used[latents] &= kept[latents].any(-1)
        used[embeddings] = True
        if not (nodes & ~used).any():
            return Kept(nodes, kept)
        nodes = nodes & used
        kept = kept & _between(nodes, graph)


def _between(nodes: Bool[Tensor, " n_sources"], graph: Graph) -> Bool[Tensor, "n_targets n_sources"]:
    rows = torch.cat([nodes[: graph.n_latents], nodes.new_ones(graph.n_logits)])
    return rows.unsqueeze(-1) & nodes


def _by_row(values: Sources, graph: Graph) -> Float[Tensor, " n_targets"]:
    return torch.cat([values[: graph.n_latents], values.new_zeros(graph.n_logits)])


def _largest(values: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """The smallest set of largest values, none negative, with this share of the sum, ties with its last one
    included. Takes one copy of the values: they are as many as the edges.
    """
    numbers = values.cpu().numpy()
    ordered = numbers[numbers > 0]
    ordered[::-1].sort()  # in place, descending
    wanted, reached = ordered.sum(dtype=np.float64) * share * (1 - 1e-12), 0.0
    for start in range(0, len(ordered), PIECE):
        sums = ordered[start : start + PIECE].astype(np.float64)
        sums[0] += reached
        reached = (sums := sums.cumsum())[-1]
        if reached >= wanted:
            return values >= float(ordered[start + np.searchsorted(sums, wanted)])
    return values >= 0

"""Computational paths of a prompt, found greedily (Dunefsky et al. 2024, arXiv 2406.11944), and their merged graph.

From a root (a latent's pre-activation, a logit difference) the largest contributions are followed back: a latent to
what its encoder reads at its token, a head to what it reads at its source token. A path's attribution is the
product of what the weights and the input give along it, in units of the root, so that at every step the attribution
of a node is exactly the sum of those of its sources: the ones that are kept, and a rest for each reason why one is
not.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from heapq import nlargest
from typing import NamedTuple

import pandas as pd
import torch

from dictlearn.checks import check_count
from dictlearn.circuits.decomposition import Decomposition, Reader, Source, behind, contributions

REST = {"attn_bias": "bias", "dec_bias": "bias", "bias": "bias", "error": "error", "skip": "skip"}
ROOT = "root"


@dataclass
class Branch:
    """The end of a path: `sources` from the first step after the root to this one.

    `attribution`: of this source through the path, in units of the root. `rest`: once it is followed back, what of
    it the kept sources do not have, by reason: "error", "skip", "bias", "special" (heads reading special tokens)
    and "pruned".
    """

    sources: tuple[Source, ...]
    attribution: float
    reader: Reader | None
    parent: Branch | None = None
    rest: dict[str, float] = field(default_factory=dict)

    @property
    def expanded(self) -> bool:
        return bool(self.rest)

    @property
    def name(self) -> str:
        return str(self.sources[-1]) if self.sources else ROOT


class PathGraph(NamedTuple):
    """Paths merged where they meet.

    `nodes`: node, attribution (over all paths through it), kind, layer, index, position, source.
    `edges`: parent, child, attribution. The edges of a parent that was followed back add up to its attribution; a
    child that is no node is a rest: "error", "skip", "bias", "special", "pruned", or "not followed" (the share of
    paths that ended there while others went on).
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame


class Paths(NamedTuple):
    """The root's value, and every path that was kept, the shorter ones first; the root itself is the first."""

    value: float
    branches: list[Branch]

    def table(self) -> pd.DataFrame:
        """A row for each path: path (from its source to the root), length, attribution, and its share of the root's
        value; the largest of each length first.
        """
        rows = [
            (" -> ".join([*map(str, reversed(b.sources)), ROOT]), len(b.sources), b.attribution)
            for b in self.branches[1:]
        ]
        found = pd.DataFrame(rows, columns=["path", "length", "attribution"])
        found["share"] = found.attribution / self.value
        return found

    def graph(self) -> PathGraph:
        """The paths merged: a source is one node, whichever paths lead to it."""
        nodes: dict[str, Source | None] = {}
        values: dict[str, float] = defaultdict(float)
        edges: dict[tuple[str, str], float] = defaultdict(float)
        followed = {branch.name for branch in self.branches if branch.expanded}
        for branch in self.branches:
            nodes[branch.name] = branch.sources[-1] if branch.sources else None
            values[branch.name] += branch.attribution
            if branch.parent is not None:
                edges[branch.parent.name, branch.name] += branch.attribution
            rest = branch.rest if branch.expanded else {"not followed": branch.attribution}
            for reason, value in rest.items() if branch.name in followed else ():
                edges[branch.name, reason] += value
        found = [
            {"node": name, "attribution": values[name]} | asdict(source or Source(ROOT, -1, -1, -1, -1))
            for name, source in nodes.items()
        ]
        links = [(parent, child, value) for (parent, child), value in edges.items()]
        return PathGraph(pd.DataFrame(found), pd.DataFrame(links, columns=["parent", "child", "attribution"]))


@torch.no_grad()
def greedy_paths(
    prompt: Decomposition, root: Reader, n_paths: int = 10, depth: int = 3, n_special: int = 0
) -> Paths:
    """The paths of the largest contributions to `root`.

    At each step all paths kept at the last one are followed back to all of their sources, and of all sources
    together those `n_paths` are kept whose attribution is largest in absolute value. Paths end at the embedding, at
    an MLP without transcoder, and after `depth` steps; a head is a step.

    Args:
        root: see `latent_reader` and `logit_reader`.
        n_special: leading special tokens, which heads are not followed to.
    """
    check_count("n_paths", n_paths)
    check_count("depth", depth)
    check_count("n_special", n_special, least=0)
    value = sum(contributions(prompt, root).values())
    branches = [Branch((), value, root)]
    frontier = branches
    for _ in range(depth):
        candidates = [found for branch in frontier for found in _followed(prompt, branch, n_special)]
        kept = nlargest(n_paths, candidates, key=lambda found: abs(found.attribution))
        for branch in kept:
            assert branch.parent is not None
            assert branch.parent.reader is not None
            branch.parent.rest["pruned"] -= branch.attribution
            branch.reader = behind(prompt, branch.parent.reader, branch.sources[-1])
        branches = branches + kept
        frontier = [branch for branch in kept if branch.reader is not None]
    return Paths(value, branches)


def _followed(prompt: Decomposition, branch: Branch, n_special: int) -> list[Branch]:
    """The sources of a branch that can be kept, all of them `pruned` at first; its rest has the others."""
    assert branch.reader is not None
    branch.rest["pruned"] = 0.0
    found = []
    for source, value in contributions(prompt, branch.reader).items():
        special = source.kind == "head" and source.source < n_special
        reason = "special" if special else REST.get(source.kind)
        if reason is not None:
            branch.rest[reason] = branch.rest.get(reason, 0.0) + value
        else:
            branch.rest["pruned"] += value
            found.append(Branch((*branch.sources, source), value, None, branch))
    return found

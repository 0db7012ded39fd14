"""Methods that take one node at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.checks import check_count
from dictlearn.circuits.cuts import Acts, Cut, labels, n_positions
from dictlearn.circuits.methods.base import Method, recorded
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch


class OneByOne(Method):
    """A score for each node that differs between clean and patch, from passes of the model of its own.

    Args:
        nodes: which ones are scored, as masks by dictionary; None: all. The others have score 0.
        n_rows: prompts in one forward.
    """

    def __init__(self, nodes: Mapping[str, NodeValues] | None = None, n_rows: int = 256) -> None:
        check_count("n_rows", n_rows)
        self.nodes, self.n_rows = nodes, n_rows

    @abstractmethod
    def effects(
        self, model: PreTrainedModel, cut: Cut, batch: PairBatch, added: Float[Tensor, "nodes n ctx n_writes d_out"]
    ) -> Float[Tensor, "nodes n"]:
        """What the metric of each clean prompt becomes where patching a node adds `added` at the write sites, less
        the metric as it is.
        """

    @torch.no_grad()
    def of_rows(
        self, model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch, positions: str
    ) -> dict[str, NodeValues]:
        clean, patch = recorded(model, cuts, batch)
        found = {}
        for cut in cuts:
            moves = _moves(cut, clean, patch, batch, positions)
            wanted = self._wanted(cut, moves.differing())
            latents, errors = (torch.zeros_like(mask, dtype=moves.values.dtype) for mask in wanted)
            tables = ((latents, wanted.latents, moves.of_latents), (errors, wanted.errors, moves.of_errors))
            for table, mask, of_node in tables:
                chunks = mask.nonzero().split(max(1, self.n_rows // len(batch)))
                for some in (chunk for chunk in chunks if len(chunk)):  # without nodes there is an empty one
                    table[some[:, 0], some[:, 1]] = self.effects(model, cut, batch, of_node(some)).mean(-1)
            found[cut.name] = NodeValues(latents, errors)
        return found

    def _wanted(self, cut: Cut, differing: NodeValues) -> NodeValues:
        if self.nodes is None:
            return differing
        asked = self.nodes[cut.name]
        return NodeValues(differing.latents & asked.latents, differing.errors & asked.errors)


class _Moves(NamedTuple):
    """What patching adds to the write sites of a dictionary.

    `values` [n, ctx, n_latents] of latents, `rests` [n, ctx, n_writes, d_out], `at` [n_positions, ctx] where a
    node's positions are.
    """

    cut: Cut
    values: Tensor
    rests: Tensor
    at: Tensor

    def differing(self) -> NodeValues:
        """Nodes whose values differ between the clean and the patch prompt of a pair."""
        latents = self.at.to(self.values.dtype) @ (self.values != 0).any(0).to(self.values.dtype)
        errors = (self.rests != 0).any(-1).any(0).T.to(self.values.dtype) @ self.at.T.to(self.values.dtype)
        return NodeValues(latents > 0, errors > 0)

    def of_latents(self, nodes: Tensor) -> Float[Tensor, "nodes n ctx n_writes d_out"]:
        """What patching each node, (position, latent), adds."""
        places, latents = nodes.unbind(-1)
        ones = torch.zeros(len(nodes), self.values.shape[-1]).to(self.values)
        rows = self.cut.written(ones.scatter(1, latents.unsqueeze(-1), 1.0))  # [nodes, n_writes, d_out]
        moved = self.values[..., latents].movedim(-1, 0) * self.at[places].unsqueeze(1)  # [nodes, n, ctx]
        return moved[..., None, None] * rows[:, None, None]

    def of_errors(self, nodes: Tensor) -> Float[Tensor, "nodes n ctx n_writes d_out"]:
        """What patching each error node, (write, position), adds."""
        writes, places = nodes.unbind(-1)
        own = torch.nn.functional.one_hot(writes, self.rests.shape[-2])  # [nodes, n_writes]
        return self.rests * self.at[places][:, None, :, None, None] * own[:, None, None, :, None]


def _moves(cut: Cut, clean: Acts, patch: Acts, batch: PairBatch, positions: str) -> _Moves:
    label = labels(batch.ctx, positions, batch.n_special, batch.clean.device)
    places = torch.arange(n_positions(batch.ctx, positions), device=label.device)
    values, rests = [], []
    for acts in (patch, clean):
        values.append(cut.dense_values(cut.dictionary.select_reads(acts)))
        rests.append(cut.rests(acts, cut.written(values[-1])))
    return _Moves(cut, values[0] - values[1], rests[0] - rests[1], label == places.unsqueeze(-1))

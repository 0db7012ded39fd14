"""What an attribution graph is: nodes, and the direct effect of each source on each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.circuits.graphs.local import LocalModel, Targets
from dictlearn.types import DictlearnError

KINDS = ("latent", "error", "embedding", "bias", "other", "logit")


class Logit(NamedTuple):
    """A logit of the next token, before a softcap: of `token` above the mean over the vocabulary, or, with `minus`,
    above that of another token.

    `text` is the token's, of a difference both for readers, with spaces as ␣; `probability` and `minus_probability`
    are those of `token` and `minus` (None: until the model has run, and where there is no `minus`).
    """

    text: str
    token: int
    minus: int | None = None
    probability: float | None = None
    minus_probability: float | None = None

    @property
    def probabilities(self) -> list[float]:
        """Of its token or tokens, as far as they are known."""
        return [p for p in (self.probability, self.minus_probability) if p is not None]


@dataclass(frozen=True, eq=False)
class Graph:
    """An attribution graph of one prompt.

    Nodes are, in this order: latents; errors (by layer, then position); token embeddings; one node for all biases;
    one for all other latents, which are no nodes; logits of next tokens. Targets are latents and logits, sources
    are all but the logits, and every row adds up: `edges[t].sum() = totals[t]`.

    Args:
        prompt, ids, tokens: the prompt, its token ids and each token as text.
        nodes: one row for each node: `kind` (one of `KINDS`), `dictionary` (its name, of latents), `layer` (where a
            latent reads; embeddings -1, logits n_layers), `position`, `index` (the latent in its dictionary, as
            interventions count; the token id of embeddings and logits, of differences of two logits the size of the
            vocabulary and on, as in circuit-tracer); -1 or "" where a node has none.
        edges: `[n_latents + n_logits, n_sources]`.
        values: of latents; with their decoder rows, what they write.
        totals: pre-activations of latents, then `logits`.
        logits: what the last rows are.
        weights: how much each of these counts in influence: its probability, or, of chosen ones, all the same.
        info: how it was made: lm, dictionaries, number of active latents, ... (plain values).
        local: the model that it is the graph of, and the places of its latents among those of the model.
    """

    prompt: str
    ids: Int[Tensor, " ctx"]
    tokens: list[str]
    nodes: pd.DataFrame
    edges: Float[Tensor, "n_targets n_sources"]
    values: Float[Tensor, " n_latents"]
    totals: Float[Tensor, " n_targets"]
    logits: list[Logit]
    weights: Float[Tensor, " n_logits"]
    info: Mapping[str, Any] = field(default_factory=dict)
    local: tuple[LocalModel, Int[Tensor, " n_latents"]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles come without the model."""
        return {**vars(self), "local": None}

    @property
    def n_latents(self) -> int:
        return len(self.values)

    @property
    def n_logits(self) -> int:
        return len(self.logits)

    @property
    def n_layers(self) -> int:
        return int(self.info["n_layers"])

    def places(self, kind: str) -> slice:
        """Where the nodes of one kind are."""
        (found,) = np.nonzero((self.nodes["kind"] == kind).to_numpy())
        return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)

    def validate(self, n: int, seed: int = 0) -> pd.DataFrame:
        """Edges checked by intervention: each of `n` sources drawn at random (all, if there are fewer) is put into
        the model twice, with attention patterns, norm denominators and MLP outputs of the prompt, and every target
        must move by its edge. This checks edges against the local replacement model, whose latents, errors and skip
        paths they are; `dictlearn.intervene(..., error="frozen", freeze="direct")` does so in the model itself.

        Returns one row for each source: its node, `largest_edge` and `largest_difference`, both absolute.
        Raises DictlearnError for a graph that does not come from a model.
        """
        check_count("n", n)
        if self.local is None:
            raise DictlearnError("Only a graph made by attribution_graph can be validated: the model is needed.")
        local, latents = self.local
        sources = [*latents.tolist(), *range(local.n_latents, local.n_sources)]  # in the model, by column
        drawn = (
            torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed))[:n].sort().values.tolist()
        )
        rows, targets = zip(*self._targets(local, latents), strict=True)
        found = []
        for column in drawn:
            moved = torch.zeros_like(self.totals)
            with torch.autocast(local.ids.device.type, enabled=False):
                changes = local.change(sources[column], targets)
            for own, change in zip(rows, changes, strict=True):
                moved[own] = change.to(moved)
            edges = self.edges[:, column]
            found.append((float(edges.abs().max()), float((moved - edges).abs().max())))
        numbers = pd.DataFrame(found, drawn, ["largest_edge", "largest_difference"])
        return self.nodes.loc[drawn].join(numbers)

    def _targets(
        self, local: LocalModel, latents: Int[Tensor, " n_latents"]
    ) -> list[tuple[Int[Tensor, " n"], Targets]]:
        """Rows of `edges`, and the targets there."""
        of_logits = torch.arange(self.n_latents, len(self.totals)), logit_targets(local, self.logits)
        return [(rows.cpu(), targets) for rows, targets in local.latent_targets(latents)] + [of_logits]


def logit_targets(local: LocalModel, logits: Sequence[Logit]) -> Targets:
    """Logits in the local model."""
    tokens = local.ids.new_tensor([one.token for one in logits])
    minus = local.ids.new_tensor([-1 if one.minus is None else one.minus for one in logits])
    return local.logit_targets(tokens, minus)

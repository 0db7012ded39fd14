"""Random scores: what a ranking is worth that knows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.checks import check_count
from dictlearn.circuits.cuts import Cut
from dictlearn.circuits.methods.base import N_ROWS
from dictlearn.circuits.methods.magnitude import Magnitude
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch


class Random(Magnitude):
    """A number from (0, 1] for each node that is active on a clean prompt, 0 for all others."""

    signed: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        check_count("seed", seed, 0)
        self.seed = seed

    def scores(
        self, model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch, positions: str, n_rows: int = N_ROWS
    ) -> dict[str, NodeValues]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(active: Tensor) -> Tensor:
            drawn = 1 - torch.rand(active.shape, generator=generator, dtype=torch.float64)
            return drawn.to(active) * (active > 0)

        found = super().scores(model, cuts, batch, positions, n_rows)
        return {name: NodeValues(draw(nodes.latents), draw(nodes.errors)) for name, nodes in found.items()}

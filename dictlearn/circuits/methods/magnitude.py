"""How much a node writes on the clean prompts, whatever it does: a baseline that knows no metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from dictlearn.circuits.cuts import Cut, labels, n_positions, record
from dictlearn.circuits.methods.base import Method, add_by_node_, by_label
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch


class Magnitude(Method):
    """The mean over pairs of |value| x norm of what the latent writes; of error nodes the norm of the error.

    The error is that of the reconstruction, bias and skip path left out.
    """

    signed: ClassVar[bool] = False

    @torch.no_grad()
    def of_rows(
        self, model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch, positions: str
    ) -> dict[str, NodeValues]:
        _, acts = record(model, cuts, batch.clean)
        return {cut.name: self._of(cut, acts, batch, positions) for cut in cuts}

    def _of(self, cut: Cut, acts: dict, batch: PairBatch, positions: str) -> NodeValues:
        d, label = cut.dictionary, labels(batch.ctx, positions, batch.n_special, batch.clean.device)
        values = cut.values(acts)
        rows = d.W_dec.reshape(d.n_latents, len(cut.writes), d.d_out) / d.write_scale.unsqueeze(-1)
        norms = rows.flatten(1).norm(dim=-1)
        n_labels = n_positions(batch.ctx, positions)
        latents = values.values.new_zeros(n_labels, d.n_latents)
        add_by_node_(latents, values, values.values.abs() * norms[values.indices], label)
        x = d.select_reads(acts)
        recon = d.decode(d.encode(x), x)
        error = cut.targets(acts) - (recon if d.site_axis else recon.unsqueeze(-2))
        size = error.norm(dim=-1).sum(0).T  # [n_writes, ctx]
        return NodeValues(latents / len(batch), by_label(size, label, n_labels) / len(batch))

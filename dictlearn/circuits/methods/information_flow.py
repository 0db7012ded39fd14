"""Information flow routes (Ferrando & Voita 2024), down to single nodes: no metric and no counterfactual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.circuits.cuts import Acts, Cut, labels, n_positions, record
from dictlearn.circuits.flow import information_flow
from dictlearn.circuits.methods.base import Method, add_by_node_, by_label
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch
from dictlearn.types import DictlearnError, SparseLatents

CHUNK = 2**24  # elements of one [entries, d] tensor


class InformationFlow(Method):
    """The share of the prediction that flows through a site, divided among its nodes.

    A node that writes z into the activation y has the weight relu(|y| - |y - z|) in L1 norms, as contributions to
    the stream have in the routes; the error node's z is bias and error. A skip path has its share too, which is no
    node's. The mean over clean prompts.

    Raises DictlearnError for a site that is no part of the routes: there are resid_pre, resid_mid, resid_post,
    attn_out and mlp_out.
    """

    signed: ClassVar[bool] = False

    @torch.no_grad()
    def of_rows(
        self, model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch, positions: str
    ) -> dict[str, NodeValues]:
        flow = information_flow(model, batch.clean).sites
        if missing := [site.name for cut in cuts for site in cut.writes if site.name not in flow]:
            raise DictlearnError(
                f"Information flow knows no site {', '.join(missing)}: it has {', '.join(sorted(flow))}."
            )
        _, acts = record(model, cuts, batch.clean)
        return {cut.name: self._of(cut, acts, batch, positions, flow) for cut in cuts}

    def _of(self, cut: Cut, acts: Acts, batch: PairBatch, positions: str, flow: Acts) -> NodeValues:
        d, label = cut.dictionary, labels(batch.ctx, positions, batch.n_special, batch.clean.device)
        n_labels = n_positions(batch.ctx, positions)
        values = cut.values(acts)
        of_token = torch.arange(values.n_tokens, device=label.device).repeat_interleave(values.offsets.diff())
        targets = cut.targets(acts).flatten(0, 1)  # [n_tokens, n_writes, d_out]
        skipped = cut.skipped(d.select_reads(acts)).flatten(0, 1)
        rests = targets - cut.written(values) - skipped
        latents, errors = values.values.new_zeros(n_labels, d.n_latents), []
        for place, site in enumerate(cut.writes):
            share = flow[site.name].flatten().to(targets)
            near = _nearness_of_entries(cut, values, of_token, targets, place)
            near_rest = _nearness(targets[:, place], rests[:, place])
            total = near_rest + _nearness(targets[:, place], skipped[:, place])
            total = total.index_add(0, of_token, near).clamp_min(torch.finfo(near.dtype).tiny)
            add_by_node_(latents, values, near * (share / total)[of_token], label)
            by_position = (near_rest * share / total).unflatten(0, (-1, batch.ctx)).sum(0)
            errors.append(by_label(by_position, label, n_labels))
        return NodeValues(latents / len(batch), torch.stack(errors) / len(batch))


def _nearness(y: Float[Tensor, "n d"], z: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return (y.abs().sum(-1) - (y - z).abs().sum(-1)).relu()


def _nearness_of_entries(
    cut: Cut, values: SparseLatents, of_token: Tensor, targets: Float[Tensor, "n_tokens n_writes d"], place: int
) -> Float[Tensor, " nnz"]:
    """Of what each active latent writes at the write site number `place`."""
    d = cut.dictionary
    found = []
    for some in torch.arange(len(of_token), device=of_token.device).split(max(1, CHUNK // d.d_out)):
        offsets = torch.arange(len(some) + 1, device=some.device)
        alone = SparseLatents(values.values[some], values.indices[some], offsets, values.n_latents)
        found.append(_nearness(targets[of_token[some], place], cut.written(alone)[:, place]))
    return torch.cat(found) if found else values.values

"""What every method of scoring nodes gives, and what those that use gradients share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.checks import check_count
from dictlearn.circuits.cuts import Acts, Cut, labels, last_logits, n_positions, record, sites_of
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch
from dictlearn.lm.taps import capture, edit
from dictlearn.types import Site, SparseLatents, TokenIds

N_ROWS = 64  # pairs in one forward
Gradients = Mapping[str, Float[Tensor, "n ctx n_writes d_out"]]  # of the metric at the write sites, by dictionary


class Method(ABC):
    """Scores nodes: an estimate, for each, of m(patched) - m(clean), the mean over pairs.

    Methods that know nothing of the metric give importances, which are never negative.

    `adds_up`: whether the scores of all parts of an activation are together that of the whole, however it is cut.
    `signed`: whether scores are negative where a node carries the behaviour; importances have no sign.
    """

    adds_up: ClassVar[bool] = False
    signed: ClassVar[bool] = True

    def scores(
        self, model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch, positions: str, n_rows: int = N_ROWS
    ) -> dict[str, NodeValues]:
        """Scores by dictionary; `positions` is "each" or "all". Pairs are scored by themselves, so that it does not
        matter how many are in one forward: at most `n_rows`.
        """
        check_count("n_rows", n_rows)
        total: dict[str, NodeValues] = {}
        for chunk in batch.split(n_rows):
            for name, nodes in self.of_rows(model, cuts, chunk, positions).items():
                parts = (part * (len(chunk) / len(batch)) for part in nodes)
                total[name] = NodeValues(*map(torch.add, parts, total[name]) if name in total else parts)
        return total

    @abstractmethod
    def of_rows(
        self, model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch, positions: str
    ) -> dict[str, NodeValues]:
        """The same of pairs that are few enough for one forward."""


def gradients(
    model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch, ids: TokenIds
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations at all sites on `ids`, and the gradient of the metric `[n, ctx, n_writes, d_out]` by dictionary;
    one forward and one backward.
    """
    acts: dict[str, Tensor] = {}
    probes: dict[
        str, Tensor
    ] = {}  # zeros that are added: their gradient is the site's, whatever else it is part of

    def probed(site: Site) -> Callable[[Tensor], Tensor]:
        def add(act: Tensor) -> Tensor:
            acts[site.name] = act.detach()
            probes[site.name] = torch.zeros_like(act, requires_grad=True)
            return act + probes[site.name]

        return add

    written = {site.name for cut in cuts for site in cut.writes}
    sites = sites_of(cuts)
    edits = {site: probed(site) for name, site in sites.items() if name in written}
    others = [site for name, site in sites.items() if name not in written]
    with torch.enable_grad(), edit(model, edits), capture(model, others) as read:
        value = batch.value(last_logits(model, ids)).sum()
        found = torch.autograd.grad(value, list(probes.values()), allow_unused=True)
    acts |= {name: act.detach() for name, act in read.items()}
    grads = {
        name: torch.zeros_like(probe) if grad is None else grad
        for (name, probe), grad in zip(probes.items(), found, strict=True)
    }
    return acts, {cut.name: torch.stack([grads[site.name] for site in cut.writes], dim=-2) for cut in cuts}


def scores_of(
    cuts: Sequence[Cut], batch: PairBatch, positions: str, clean: Acts, patch: Acts, grads: Gradients
) -> dict[str, NodeValues]:
    """(patch - clean) of every node along the gradient, summed over the positions of a node, the mean over pairs.

    Only latents that are active on the clean or the patch prompt are touched, at positions since the pairs differ.
    At each write site the scores of latents and errors add up to gradient . (x_patch - x_clean), x being the
    activation without what a skip path writes.
    """
    return {
        cut.name: _scores(cut, batch, positions, clean, patch, grads[cut.name].to(cut.dictionary.b_dec.dtype))
        for cut in cuts
    }


def _scores(
    cut: Cut,
    batch: PairBatch,
    positions: str,
    clean: Acts,
    patch: Acts,
    grad: Float[Tensor, "n ctx n_writes d_out"],
) -> NodeValues:
    since = batch.since
    label = labels(batch.ctx, positions, batch.n_special, grad.device)[since:]
    n_labels, n_latents = n_positions(batch.ctx, positions), cut.dictionary.n_latents
    tables, rests, grad = grad.new_zeros(2, n_labels, n_latents), [], grad[:, since:]
    for table, own in zip(tables, (patch, clean), strict=True):
        acts = {name: own[name][:, since:] for name in cut.sites}
        values = cut.values(acts)
        written, effects = cut.written_along(values, grad.flatten(0, 1))
        add_by_node_(table, values, effects, label)
        rests.append(cut.rests(acts, written.unflatten(0, grad.shape[:2])))
    latents = tables[0].sub_(tables[1])  # exactly zero where the pairs agree
    moved = (rests[0] - rests[1]).mul_(grad).sum((0, -1))  # [positions, n_writes]
    return NodeValues(latents / len(batch), by_label(moved.T, label, n_labels) / len(batch))


def add_by_node_(
    table: Float[Tensor, "n_positions n_latents"],
    latents: SparseLatents,
    values: Float[Tensor, " nnz"],
    label: Int[Tensor, " ctx"],
) -> None:
    """Add a value of each entry of `latents`, over tokens `[n * ctx]`, to that of its node."""
    of_token = label.repeat(latents.n_tokens // len(label))
    of_entry = of_token.repeat_interleave(latents.offsets.diff(), output_size=len(values))
    counted = of_entry >= 0
    places = (of_entry * table.shape[1] + latents.indices)[counted]
    table.view(-1).index_add_(0, places, values[counted])


def by_label(
    values: Float[Tensor, "*any ctx"], label: Int[Tensor, " ctx"], n_labels: int
) -> Float[Tensor, "*any n_labels"]:
    """Values of positions summed up for each label."""
    counted = label >= 0
    found = values.new_zeros(*values.shape[:-1], n_labels)
    return found.index_add_(-1, label[counted], values[..., counted])


def recorded(
    model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations of the clean and of the patch prompts."""
    return record(model, cuts, batch.clean)[1], record(model, cuts, batch.patch)[1]

"""The model with a circuit left in it: all other nodes ablated, those of the circuit computed on what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.circuits.ablation import Ablated
from dictlearn.circuits.cuts import Cut, check_cuts, labels, last_logits, sites_of
from dictlearn.circuits.nodes import Nodes, NodeValues
from dictlearn.circuits.pairs import PairBatch
from dictlearn.lm import LM, model_of
from dictlearn.lm.taps import edit
from dictlearn.types import DictlearnError

Where: TypeAlias = tuple[str, str]  # module and io of a site, which may have several names


@torch.no_grad()
def run_circuit(
    model: LM | PreTrainedModel,
    cuts: Sequence[Cut],
    batch: PairBatch,
    circuit: Nodes,
    ablated: Mapping[str, Ablated],
    skips: bool = True,
) -> Float[Tensor, " n"]:
    """The metric of each clean prompt with the nodes outside `circuit` ablated (Marks et al. 2024).

    Latents and errors of the circuit, and skip paths, are computed on the stream as it runs, after ablation.
    At special tokens nothing is ablated. Without `skips` what skip paths write is ablated as well.

    Raises DictlearnError where the model reaches a write site before a site that its dictionary reads.
    """
    check_cuts(cuts)
    read: dict[Where, Tensor] = {}
    writers: dict[Where, tuple[Cut, int]] = {s[1:]: (cut, i) for cut in cuts for i, s in enumerate(cut.writes)}

    def at(where: Where) -> Callable[[Tensor], Tensor]:
        def edited(act: Tensor) -> Tensor:
            read[where] = act
            if where in writers:
                cut, place = writers[where]
                label = labels(batch.ctx, _positions(circuit[cut.name]), batch.n_special, act.device)
                read[where] = _ablate(cut, place, act, read, circuit[cut.name], ablated[cut.name], label, skips)
            return read[where]

        return edited

    own = model_of(model)
    with edit(own, {site: at(where) for where, site in {s[1:]: s for s in sites_of(cuts).values()}.items()}):
        return batch.value(last_logits(own, batch.clean))


def _positions(nodes: NodeValues) -> str:
    return "all" if len(nodes.latents) == 1 else "each"


def _ablate(
    cut: Cut,
    place: int,
    act: Float[Tensor, "n ctx d"],
    read: Mapping[Where, Tensor],
    kept: NodeValues,
    ablated: Ablated,
    label: Int[Tensor, " ctx"],
    skips: bool,
) -> Float[Tensor, "n ctx d"]:
    """The activation at the write site number `place`, with what is not `kept` exchanged."""
    d = cut.dictionary
    needed = cut.reads[: place + 1] if d.layered else cut.reads
    if late := [site.name for site in needed if site[1:] not in read]:
        raise DictlearnError(
            f"{cut.name} writes {cut.writes[place].name} before the model reaches its read {late[0]}."
        )
    unread = torch.zeros_like(act[..., :1]).expand(*act.shape[:-1], d.d_in)  # later layers write nothing here
    x = d.select_reads({site.name: read.get(site[1:], unread) for site in cut.reads})
    values = cut.dense_values(x)  # [n, ctx, n_latents]
    change = torch.where(_at(kept.latents, label), 0.0, ablated.values - values)
    added = cut.written(change)[..., place, :]
    keep = _at(kept.errors[place], label)  # [ctx]
    if not keep.all():
        rest = act - (cut.written(values) + cut.skipped(x))[..., place, :]
        to = cut.bias(x) if ablated.rest is None else ablated.rest
        added = added + torch.where(keep.unsqueeze(-1), 0.0, to[..., place, :] - rest)
    if not skips and d.W_skip is not None:
        moved = (0.0 if ablated.skipped is None else ablated.skipped) - cut.skipped(x)
        added = added + torch.where((label < 0).unsqueeze(-1), 0.0, moved[..., place, :])
    return act + added.to(act.dtype)


def _at(kept: Bool[Tensor, "n_positions *any"], label: Int[Tensor, " ctx"]) -> Bool[Tensor, "ctx *any"]:
    """Whether the node at each position is kept; at special tokens all are."""
    found = kept[label.clamp_min(0)]
    found[label < 0] = True
    return found

"""From a prompt to its attribution graph."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.circuits.graphs.graph import Graph, Logit, logit_targets
from dictlearn.circuits.graphs.influence import CHUNK, influence
from dictlearn.circuits.graphs.inputs import (
    Choice,
    chosen,
    doubtful,
    likeliest,
    n_logits_of,
    prompt_ids,
    with_probabilities,
)
from dictlearn.circuits.graphs.local import LocalModel, Targets
from dictlearn.circuits.surgery import bytes_in_float32
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM
from dictlearn.splice import by_name
from dictlearn.types import DictlearnError, TokenIds

RERANK = 16  # batches of targets between two rankings by influence


def attribution_graph(
    lm: LM,
    dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary],
    prompt: str | Tensor,
    targets: Sequence[Choice] | None = None,
    max_latents: int = 7500,
    max_logits: int = 10,
    logit_share: float = 0.95,
    batch_size: int = 128,
) -> Graph:
    """The attribution graph of a prompt (Ameisen et al. 2025): direct effects between its active latents, errors,
    token embeddings and logits of the next token, in the local replacement model (local.py).

    Args:
        dictionaries: transcoders of the MLPs of some or all layers, or a cross-layer one, named as by `attach`; an
            MLP without one is all error.
        prompt: text, which gets the beginning-of-sequence token that the dictionaries were trained with; or token
            ids `[1, ctx]`. Leading special tokens have neither latents nor errors.
        targets: logits of one's own, which all count the same: tokens, as text or ids, and pairs of them, for the
            first logit minus the second: `[" Paris", (" Paris", " Rome")]`. None: the likeliest tokens.
        max_latents: if more are active, those of most influence are nodes, and the others are summed up in one.
        max_logits, logit_share: without `targets`, the likeliest tokens that together have this probability, at
            most so many.
        batch_size: targets in one backward pass.

    Raises DictlearnError for dictionaries or a family that do not fit, an empty prompt or one longer than the LM
    takes, targets that are not one token each, values outside ranges, and, before any edge is computed, for a graph
    that takes more memory than there is.
    """
    for name, value in (("max_latents", max_latents), ("max_logits", max_logits), ("batch_size", batch_size)):
        check_count(name, value)
    if not 0 < logit_share <= 1:
        raise DictlearnError(f"logit_share must be above 0 and at most 1, got {logit_share}.")
    dictionaries = by_name(dictionaries)
    ids = prompt_ids(lm.model, lm.tokenizer, lm.name, dictionaries, prompt).to(lm.device)
    own = None if targets is None else chosen(lm.tokenizer, n_logits_of(lm.model), targets)
    with torch.inference_mode(mode=False), torch.autocast(lm.device.type, enabled=False):
        local = LocalModel(lm.model, dictionaries, ids.clone(), _n_special(lm, ids))
        logits, weights = _logits(lm, local, own, max_logits, logit_share)
        _check_memory(local, len(logits), max_latents, batch_size)
        rows = _expanded(local, logits, weights, max_latents, batch_size)
        local.release()
        latents, rows = _sorted(local, rows, len(logits))
    return Graph(
        prompt=prompt if isinstance(prompt, str) else "".join(_texts(lm, ids[0])),
        ids=ids[0].cpu(),
        tokens=_texts(lm, ids[0]),
        nodes=_nodes(local, latents, logits),
        edges=rows.edges.cpu(),
        values=local.active.value[latents].cpu(),
        totals=rows.totals.cpu(),
        logits=logits,
        weights=weights.cpu(),
        info=_info(lm, local, rows, own),
        local=(local, latents),
    )


def _info(lm: LM, local: LocalModel, rows: _Rows, own: Sequence[Logit] | None) -> dict[str, Any]:
    probability, token = local.logits.float().softmax(-1).max(-1)
    off = (rows.edges.sum(-1, dtype=torch.float64) - rows.totals).abs().max() / rows.totals.abs().max()
    several = {cut.name: cut.dictionary.n_latents // len(cut.reads) for cut in local.cuts if len(cut.reads) > 1}
    return {
        "lm": lm.name,
        "dictionaries": [cut.name for cut in local.cuts],
        "n_per_layer": several,  # latents, of cross-layer transcoders
        "n_layers": len(local.layers),
        "n_special": local.n_special,
        "n_active": local.n_latents,
        "next_token": _texts(lm, token[None])[0],
        "probability": float(probability),
        "unknown": [position for position in _unknown(lm, local.ids) if position >= local.n_special],
        "doubtful_targets": doubtful(lm.tokenizer, own or [], local.logits),
        "row_error": float(off),
    }


def _logits(
    lm: LM, local: LocalModel, own: list[Logit] | None, max_logits: int, share: float
) -> tuple[list[Logit], Float[Tensor, " n_logits"]]:
    """The logits of a graph, and how much they count."""
    if own is not None:
        return with_probabilities(own, local.logits), torch.full((len(own),), 1 / len(own), device=lm.device)
    tokens, weights = likeliest(local.logits, max_logits, share)
    of_tokens = zip(_texts(lm, tokens), tokens.tolist(), weights.tolist(), strict=True)
    return [Logit(text, token, None, probability) for text, token, probability in of_tokens], weights


def _check_memory(local: LocalModel, n_logits: int, max_latents: int, batch_size: int) -> None:
    """Raises DictlearnError where the rows, over all sources and sorted over the nodes alone, a batch in work and
    the float32 copy of a narrower model are more than there is.
    """
    copied = bytes_in_float32(local.model)
    device, size = local.ids.device, local.errors.element_size()
    n_latents, others = min(max_latents, local.n_latents), local.n_sources - local.n_latents + 2

    def needed(n: int) -> int:
        """Bytes with so many latents as nodes."""
        rows = (n_logits + n) * (local.n_sources + n + others) + 2 * batch_size * local.n_sources
        return size * rows + copied

    if needed(n_latents) > (there := memory_of(device)):
        fits = bisect_right(range(n_latents), there, key=needed) - 1
        advice = f"with batch_size={batch_size}, max_latents={fits} would fit" if fits > 0 else "none would fit"
        raise DictlearnError(
            f"A graph with {n_latents} of {local.n_latents} active latents as nodes takes "
            f"{needed(n_latents) / 1e9:.1f} GB, and there are {there / 1e9:.1f} GB on {device}: {advice}. "
            "Fewer are active in a sparser dictionary or a shorter prompt."
        )


def memory_of(device: torch.device) -> int:
    """Bytes: of a GPU those that are free, else all that the machine has."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _texts(lm: LM, ids: Int[Tensor, " n"]) -> list[str]:
    return [str(lm.tokenizer.decode([token])) for token in ids.tolist()]


def _unknown(lm: LM, ids: TokenIds) -> list[int]:
    """Positions of words that the tokenizer does not have."""
    return [position for position, token in enumerate(ids[0].tolist()) if token == lm.tokenizer.unk_token_id]


def _n_special(lm: LM, ids: TokenIds) -> int:
    """Special tokens at the start; the unknown token is one where it is another special token as well (GPT-2's)."""
    own = lm.tokenizer
    named = (own.bos_token_id, own.eos_token_id, own.pad_token_id)
    special = [token for token in own.all_special_ids if token != own.unk_token_id or token in named]
    listed = [token in special for token in ids[0].tolist()]
    return listed.index(False) if False in listed else len(listed)


class _Rows(NamedTuple):
    """Rows of the graph as they are found, over all sources of the local model; `latents` has -1 for logits."""

    edges: Float[Tensor, "n_targets n_sources"]
    latents: Int[Tensor, " n_targets"]
    totals: Float[Tensor, " n_targets"]
    biases: Float[Tensor, " n_targets"]

    @staticmethod
    def empty(local: LocalModel, n: int) -> _Rows:
        numbers = local.errors.new_zeros
        latents = torch.full((n,), -1, device=local.errors.device)
        return _Rows(numbers(n, local.n_sources), latents, numbers(n), numbers(n))

    def fill(self, local: LocalModel, where: slice, targets: Targets) -> None:
        self.edges[where] = local.edges(targets)
        self.totals[where], self.biases[where] = local.total(targets), local.bias(targets)


@torch.no_grad()
def _expanded(
    local: LocalModel,
    logits: Sequence[Logit],
    weights: Float[Tensor, " n_logits"],
    max_latents: int,
    batch_size: int,
) -> _Rows:
    """Rows of the logits, then of latents: of all, or of those that have most influence on the rows so far."""
    rows = _Rows.empty(local, len(logits) + min(max_latents, local.n_latents))
    rows.fill(local, slice(0, len(logits)), logit_targets(local, logits))
    n, following = len(logits), torch.arange(local.n_latents, device=rows.latents.device)
    ranks = local.n_latents > max_latents
    while n < len(rows.edges):
        if ranks:
            by_row = F.pad(weights.to(rows.edges.dtype), (0, n - len(logits)))
            found = influence(rows.edges[:n], by_row, rows.latents[:n])[: local.n_latents]
            found[rows.latents[len(logits) : n]] = -1  # they have their rows
            following = found.topk(min(RERANK * batch_size, len(rows.edges) - n)).indices
        for places, targets in local.latent_targets(following):
            for some in places.new_tensor(range(len(places))).split(batch_size):
                where = slice(n, n + len(some))
                rows.latents[where] = following[places[some]]
                rows.fill(local, where, Targets(targets.layer, *(part[some] for part in targets[1:])))
                n += len(some)
    return rows


def _sorted(local: LocalModel, rows: _Rows, n_logits: int) -> tuple[Int[Tensor, " n"], _Rows]:
    """The latents that are nodes, in order, and rows with one column for each source of a graph: latents, errors,
    embeddings, biases, other latents.
    """
    latents = rows.latents[n_logits:].sort()
    order = torch.cat([latents.indices + n_logits, torch.arange(n_logits, device=latents.indices.device)])
    is_other = rows.edges.new_ones(local.n_latents)
    is_other[latents.values] = 0
    kept = torch.cat([latents.values, torch.arange(local.n_latents, local.n_sources, device=order.device)])
    edges = rows.edges.new_empty(len(order), len(kept) + 2)
    for some, part in zip(order.split(CHUNK), edges.split(CHUNK), strict=True):  # no further copy of all rows
        own = rows.edges[some]
        part[:, :-2], part[:, -2] = own[:, kept], rows.biases[some]
        part[:, -1] = own[:, : local.n_latents] @ is_other
    return latents.values, _Rows(edges, *(own[order] for own in rows[1:]))


def _nodes(local: LocalModel, latents: Int[Tensor, " n"], logits: Sequence[Logit]) -> pd.DataFrame:
    """The table `Graph.nodes`."""
    n_layers, ctx, vocab = len(local.layers), local.ctx, n_logits_of(local.model)
    numbers, positions = range(n_layers), range(ctx)
    layer, position, index = (part[latents].tolist() for part in local.active[:3])
    names = [local.layers[number].cut.name for number in layer]
    of_logits = [one.token if one.minus is None else vocab + number for number, one in enumerate(logits)]
    parts = {
        "latent": (names, layer, position, index),
        "error": ("", [number for number in numbers for _ in positions], [*positions] * n_layers, -1),
        "embedding": ("", -1, [*positions], local.ids[0].tolist()),
        "bias": ("", [-1], -1, -1),
        "other": ("", [-1], -1, -1),
        "logit": ("", n_layers, ctx - 1, of_logits),
    }
    columns = ("dictionary", "layer", "position", "index")
    tables = [pd.DataFrame({"kind": kind, **dict(zip(columns, own, strict=True))}) for kind, own in parts.items()]
    return pd.concat(tables, ignore_index=True)

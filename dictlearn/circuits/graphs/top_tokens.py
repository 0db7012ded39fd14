"""The tokens that a latent makes likelier and unlikelier by what it writes, past all later layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.circuits.cuts import cuts_of
from dictlearn.circuits.graphs.graph import Graph
from dictlearn.circuits.graphs.layers import Layer, layers_of
from dictlearn.circuits.weights import linear_maps, logit_effects
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM

CHUNK_ELEMENTS = 2**26  # of one [n_latents, vocab]


class TopTokens(NamedTuple):
    """Tokens as text, the strongest first."""

    promoted: list[str]
    suppressed: list[str]


@torch.no_grad()
def top_tokens(
    lm: LM, dictionaries: Mapping[str, Dictionary], graph: Graph, nodes: Sequence[int], n: int = 5
) -> dict[int, TopTokens]:
    """The `n` tokens whose logits, about the mean over the vocabulary, latents raise and lower most; by node.

    The effect is that of decoder rows (at all write sites together) through the final norm's gain and centring and
    the unembedding. Its denominator changes no order, and a softcap none either. Special tokens are left out.

    Args:
        nodes: latents of `graph`.

    Raises DictlearnError like `attribution_graph`.
    """
    check_count("n", n)
    if not nodes:
        return {}
    directions = _written(layers_of(lm.model, cuts_of(lm.model, dictionaries)), graph, nodes)
    maps, found = linear_maps(lm.model), []
    special = [token for token in lm.tokenizer.all_special_ids if token < len(maps.unembedding)]
    n = min(n, len(maps.unembedding) - len(special))
    for some in directions.split(max(1, CHUNK_ELEMENTS // len(maps.unembedding))):
        logits = logit_effects(maps, some)
        ids = []
        for largest, last in ((True, -torch.inf), (False, torch.inf)):
            logits[:, special] = last
            ids.append(logits.topk(n, largest=largest).indices.tolist())
        found += [TopTokens(*(_texts(lm, own) for own in both)) for both in zip(*ids, strict=True)]
    return dict(zip(nodes, found, strict=True))


def _written(layers: Sequence[Layer], graph: Graph, nodes: Sequence[int]) -> Float[Tensor, "n d"]:
    """What latents of value 1 write, at all their sites together."""
    table = graph.nodes.iloc[list(nodes)]
    d = next(layer.cut.dictionary for layer in layers if layer.cut is not None)
    found = d.b_dec.new_zeros(len(nodes), d.d_out)
    names, index = table["dictionary"].tolist(), _numbers(table["index"].tolist(), d)
    for layer in layers:
        if layer.cut is not None:
            own = _numbers([place for place, name in enumerate(names) if name == layer.cut.name], d)
            found[own] += layer.decoder_rows(index[own]).to(found)
    return found


def _numbers(values: Sequence[int], d: Dictionary) -> Int[Tensor, " n"]:
    return torch.tensor(values, dtype=torch.int64, device=d.b_dec.device)


def _texts(lm: LM, ids: Sequence[int]) -> list[str]:
    return [str(lm.tokenizer.decode([token])) for token in ids]

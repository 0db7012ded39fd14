"""Information flow routes (Ferrando & Voita 2024): how much of a prediction came by which site, from one forward.

The stream y after attention or the MLP is a sum of contributions z: the stream before, each head from each source
position (its pattern times OV), the MLP's output. The importance of z for y is relu(|y| - |y - z|) in L1 norms, as
a share of all contributions. Shares are followed down from the last position of the last layer: what flows into a
head goes on to its source position, what flows into an MLP to the stream that it reads. Nothing is asked of the
metric, and no counterfactual is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dictlearn.circuits.parts import (
    inverse_scale,
    is_norm,
    is_parallel,
    n_layers,
    normed,
    output_weight,
    parts_of,
    widened,
)
from dictlearn.circuits.surgery import attention
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture
from dictlearn.types import Site, TokenIds


class Flow(NamedTuple):
    """Shares of the prediction after the last token, each row for itself.

    `sites` by name: resid_pre, resid_mid (not where attention and MLP are parallel), resid_post, attn_out and
    mlp_out of each layer, at each position. Those of a residual site add up to 1.
    `heads`: of attn_out, by head, at the position that the head writes to.
    """

    sites: dict[str, Float[Tensor, "n ctx"]]
    heads: Float[Tensor, "n n_layers n_heads ctx"]


class _Layer(NamedTuple):
    """What one layer adds to the stream.

    At position t a head adds pattern[t, s] * (value[s] @ W_O) * scale[t] from each source s.
    """

    pre: Float[Tensor, "n ctx d"]
    attn_out: Float[Tensor, "n ctx d"]
    mlp_out: Float[Tensor, "n ctx d"]
    post: Float[Tensor, "n ctx d"]
    pattern: Float[Tensor, "n n_heads ctx ctx"]
    value: Float[Tensor, "n n_heads ctx d_head"]
    W_O: Float[Tensor, "n_heads d_head d"]
    scale: Float[Tensor, "n ctx d"]


@torch.no_grad()
def information_flow(model: PreTrainedModel, ids: TokenIds) -> Flow:
    """How much of what the model holds at the last position of `ids [n, ctx]` flows through each site.

    Biases are nobody's contribution. Where no contribution points along the sum, all flows in the stream.

    Raises DictlearnError for a family or a module that is not known, and where norms stand on the residual stream
    itself, so that contributions do not sum up to it (opt-350m).
    """
    layers = _layers(model, ids)
    parallel = is_parallel(model)
    now = torch.zeros_like(layers[0].pre[..., 0])  # [n, ctx], the shares at the present cut
    now[:, -1] = 1
    sites: dict[str, Tensor] = {}
    heads: list[Tensor] = []
    for index, layer in reversed(list(enumerate(layers))):
        sites[f"resid_post.{index}"] = now
        if parallel:
            nearness = (_nearness(layer.post, z) for z in (layer.pre, layer.mlp_out))
            stream, mlp, sources = _spread(now, *nearness, _heads_nearness(layer.post, layer))
            below = stream + mlp
        else:
            mid = layer.pre + layer.attn_out
            stream, mlp = _spread(now, *(_nearness(layer.post, z) for z in (mid, layer.mlp_out)))
            now = sites[f"resid_mid.{index}"] = stream + mlp
            below, sources = _spread(now, _nearness(mid, layer.pre), _heads_nearness(mid, layer))
        heads.append(sources.sum(-1).mT)  # [n, n_heads, ctx]
        now = below + sources.sum((1, 2))
        sites |= {f"mlp_out.{index}": mlp, f"attn_out.{index}": sources.sum((2, 3)), f"resid_pre.{index}": now}
    return Flow(sites, torch.stack(heads[::-1], dim=1))


def _nearness(y: Float[Tensor, "*#batch d"], z: Float[Tensor, "*#batch d"]) -> Float[Tensor, "*batch"]:
    """How much of y points along z."""
    return (y.abs().sum(-1) - (y - z).abs().sum(-1)).relu()


def _heads_nearness(y: Float[Tensor, "n ctx d"], layer: _Layer) -> Float[Tensor, "n ctx n_heads ctx"]:
    """How much of y at each position points along what each head adds from each source position."""
    found = torch.zeros_like(layer.pattern).transpose(1, 2)
    for head, weight in enumerate(layer.W_O):
        written = layer.value[:, head] @ weight  # [n, ctx, d]
        for t in range(y.shape[1]):
            past = slice(t + 1)
            added = layer.pattern[:, head, t, past, None] * written[:, past] * layer.scale[:, t, None]
            found[:, t, head, past] = _nearness(y[:, t, None], added)
    return found


def _spread(
    now: Float[Tensor, "n ctx"], stream: Float[Tensor, "n ctx"], *others: Float[Tensor, "n ctx ..."]
) -> list[Tensor]:
    """The share of each position, divided by the nearness of the stream and of the other contributions."""
    total = stream + sum(near.reshape(*now.shape, -1).sum(-1) for near in others)
    stream, total = (torch.where(total > 0, x, 1.0) for x in (stream, total))
    each = now / total
    return [near * each.view(*now.shape, *[1] * (near.ndim - 2)) for near in (stream, *others)]


def _layers(model: PreTrainedModel, ids: TokenIds) -> list[_Layer]:
    attentions = parts_of(model).attentions
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    sites = [[resolve(model, f"{kind}.{layer}") for kind in kinds] for layer in range(n_layers(model))]
    before_norms = [Site(f"{own[1].module}:in", own[1].module, "in") for own in sites]
    recorded: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, pattern: Tensor, value: Tensor) -> Tensor:
        recorded[module] = pattern, value
        return pattern @ value

    wanted = [site for own in sites for site in own]
    wanted += [site for site in before_norms if is_norm(model.get_submodule(site.module))]
    with attention(model, record), capture(model, wanted) as acts:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    layers = []
    for layer, own in enumerate(sites):
        pre, attn_out, mlp_out, post = (widened(acts[site.name]) for site in own)
        pattern, value = (widened(x) for x in recorded[attentions[layer]])
        weight = output_weight(model, layer).unflatten(0, (value.shape[1], -1))
        scale = torch.ones_like(pre)
        if (raw := acts.get(before_norms[layer].name)) is not None:
            norm = model.get_submodule(own[1].module)
            scale = normed(norm, scale, inverse_scale(norm, raw))
        layers.append(_Layer(pre, attn_out, mlp_out, post, pattern, value, widened(weight), scale))
    return layers

"""What heads do: where they look, and which latents they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dictlearn.checks import check_count
from dictlearn.circuits.attention_latents import ByHead, direct_feature_attribution, head_attribution, heads_read
from dictlearn.circuits.heads import CHUNK, n_heads
from dictlearn.circuits.parts import layer_at, n_layers, parts_of
from dictlearn.circuits.surgery import attention
from dictlearn.circuits.weights import LinearMaps
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import resolve
from dictlearn.types import DictlearnError, TokenIds

NAMED = 3  # latents in `top_latents`
BUDGET = 2**24  # contributions of one call
COLUMNS = {
    "dictionary": object,
    "dfa_share": float,
    "top_latents": object,
    "source_offset": "Int64",
    "offset_share": float,
}
OF_ROLES = {"source_role": object, "role_share": float}
Masks = dict[str, Bool[Tensor, "rows ctx ctx"]]


@torch.no_grad()
def attention_scores(model: PreTrainedModel, ids: TokenIds, n_special: int = 0) -> pd.DataFrame:
    """Where each head looks: the pattern's mean weight, over all tokens of `ids` that have such a place, on

    - `previous_token`: the token before (Olsson et al. 2022, arXiv 2209.11895).
    - `duplicate_token`: earlier tokens that equal the present one, all together (Wang et al. 2023, arXiv
      2211.00593).
    - `induction`: earlier tokens that come right after such a one, all together: the prefix matching score of
      Olsson et al.

    One row per `layer` and `head`; missing where `ids` have no such tokens. Published values are of random tokens,
    written twice. The first `n_special` tokens of each row neither look nor are looked at.

    Raises DictlearnError for a family or a module that is not known, and in training mode.
    """
    check_count("n_special", n_special, least=0)
    layers, counts = {module: i for i, module in enumerate(parts_of(model).attentions)}, {}
    sums = {name: torch.zeros(n_layers(model), n_heads(model), dtype=torch.float64) for name in _places(ids, 0)}
    masks: Masks = {}

    def mix(module: nn.Module, pattern: Tensor, value: Tensor) -> Tensor:
        for name, mask in masks.items():
            on_places = (pattern * mask.unsqueeze(1)).sum((0, 2, 3), dtype=torch.float64)
            sums[name][layers[module]] += on_places.cpu()
        return pattern @ value

    with attention(model, mix):
        for some in ids.to(model.device).split(CHUNK):
            masks.update(_places(some, n_special))
            for name, mask in masks.items():
                counts[name] = counts.get(name, 0) + int(mask.any(-1).sum())
            model.base_model(input_ids=some, use_cache=False)
    means = {name: (total / counts[name] if counts[name] else total * torch.nan) for name, total in sums.items()}
    index = pd.MultiIndex.from_product([range(n_layers(model)), range(n_heads(model))], names=["layer", "head"])
    return pd.DataFrame({name: mean.flatten().numpy() for name, mean in means.items()}, index).reset_index()


def _places(ids: TokenIds, n_special: int) -> Masks:
    """The earlier tokens that each token is asked about."""
    ctx = ids.shape[1]
    at = torch.arange(ctx, device=ids.device)
    earlier = (at < at.unsqueeze(1)) & (at >= n_special)  # [looking, looked at]
    same = (ids.unsqueeze(1) == ids.unsqueeze(2)) & earlier
    after = torch.zeros_like(same)
    after[..., 1:] = same[..., :-1]
    previous = ((at == at.unsqueeze(1) - 1) & earlier).expand_as(same)
    return {"previous_token": previous, "duplicate_token": same, "induction": after & earlier}


@torch.no_grad()
def head_table(
    maps: LinearMaps,
    ids: TokenIds,
    dictionaries: Mapping[str, Dictionary],
    positions: Sequence[int] | None = None,
    n_special: int = 0,
    roles: Mapping[str, int] | None = None,
    n_latents: int = 10,
) -> pd.DataFrame:
    """One row per `layer` and `head`: `attention_scores`, and what dictionaries of heads' outputs say of it.

    Columns beside those of `attention_scores`; missing where no dictionary reads the layer's heads, and where there
    is nothing to divide, as no latent is active:
    - `dictionary`: the name of the layer's dictionary.
    - `dfa_share`: the head's share in the attribution of the dictionary's `n_latents` most attributed latents.
      A latent's attribution by head is `head_attribution`: direct feature attribution (Kissane et al. 2024) where
      the latent is active; shares are of absolute values, and the most attributed have the largest sum of these.
    - `top_latents`: the latents of the dictionary which the head attributes most to, in absolute values; up to 3.
    - `source_offset`: how far back the head finds what it writes: the distance from destination to source with the
      largest sum of absolute contributions to the most attributed latents where they are active;
      `offset_share`: of that distance in the sum over all of them.
    - `source_role`, `role_share`, where `roles` are given: the same of source positions that have a role; the share
      is of the sum over all positions. Roles of one position stand side by side, "second_copy/end".

    Args:
        ids: prompts without padding, such as `batch.clean` of a PairBatch, with its `n_special` and `roles`.
        dictionaries: by name; those that read attn_z.L or attn_out.L, one at most for a layer.
        positions: destinations of attribution, such as [-1]; None: all after the special tokens.

    Raises DictlearnError for two dictionaries of one layer, for roles at positions that `ids` do not have, and like
    `direct_feature_attribution`.
    """
    check_count("n_latents", n_latents)
    if outside := {role: at for role, at in (roles or {}).items() if not 0 <= at < ids.shape[1]}:
        raise DictlearnError(f"roles must be at positions 0 to {ids.shape[1] - 1}, got {outside}.")
    owners: dict[int, str] = {}
    for name, dictionary in dictionaries.items():
        layer, _ = heads_read(maps.model, dictionary)
        if layer in owners:
            raise DictlearnError(
                f"A layer takes one dictionary of its heads: {owners[layer]} and {name} read layer {layer}."
            )
        owners[layer] = name
    places = list(range(n_special, ids.shape[1]) if positions is None else positions)
    scores = attention_scores(maps.model, ids, n_special)
    rows: list[dict[str, Any]] = []
    for layer in range(len(maps.attentions)):
        if layer in owners:
            found = _attributed(maps, dictionaries[owners[layer]], ids, places, roles or {}, n_latents)
            rows += [{"dictionary": owners[layer], **row} for row in found]
        else:
            rows += [{}] * n_heads(maps.model)
    kinds = COLUMNS | (OF_ROLES if roles else {})
    return scores.join(pd.DataFrame(rows, scores.index, columns=list(kinds)).astype(kinds))


def _attributed(
    maps: LinearMaps,
    dictionary: Dictionary,
    ids: TokenIds,
    positions: Sequence[int],
    roles: Mapping[str, int],
    n_latents: int,
) -> list[dict[str, Any]]:
    """The columns of each head of the layer that `dictionary` reads."""
    by_head = head_attribution(maps, dictionary, ids, positions).abs()  # [n_latents, n_heads]
    most = by_head.sum(-1).topk(min(n_latents, len(by_head))).indices
    shares = by_head[most].sum(0)
    total = shares.sum()
    offsets, sources = _where_from(maps, dictionary, ids, positions, most)
    found: list[dict[str, Any]] = []
    for head, share in enumerate(shares):
        row: dict[str, Any] = {}
        best = by_head[:, head].topk(min(NAMED, len(by_head)))
        if total > 0:
            row["dfa_share"] = float(share / total)
        if best.values[0] > 0:
            row["top_latents"] = tuple(best.indices[best.values > 0].tolist())
        if (size := offsets[head].sum()) > 0:
            row["source_offset"] = int(offsets[head].argmax())
            row["offset_share"] = float(offsets[head].max() / size)
        if roles and size > 0:
            place = max(roles.values(), key=lambda at: float(sources[head, at]))
            row["source_role"] = "/".join(role for role, at in roles.items() if at == place)
            row["role_share"] = float(sources[head, place] / size)
        found.append(row)
    return found


def _where_from(
    maps: LinearMaps, dictionary: Dictionary, ids: TokenIds, positions: Sequence[int], latents: Tensor
) -> tuple[Float[Tensor, "n_heads ctx"], Float[Tensor, "n_heads ctx"]]:
    """Sums of absolute contributions to latents where they are active, by distance and by source position."""
    ctx, heads = ids.shape[1], len(maps.attentions[0].W_O)
    like = maps.unembedding
    offsets, sources = like.new_zeros(heads, ctx), like.new_zeros(heads, ctx)
    for some in ids.split(max(1, BUDGET // (len(latents) * len(positions) * heads * ctx))):
        found = direct_feature_attribution(maps, dictionary, some, latents.tolist(), positions)
        active = found.latent_values != 0  # [rows, n_positions, n_latents]
        sizes = torch.einsum("bpnhs,bpn->hps", found.contributions.abs(), active.to(like))
        sources += sizes.sum(1)
        for place, size in zip(found.positions.tolist(), sizes.unbind(1), strict=True):
            offsets[:, : place + 1] += size[:, : place + 1].flip(-1)
    return offsets, sources


def decoder_shares(model: PreTrainedModel, dictionary: Dictionary) -> ByHead:
    """||W_dec[i, head h]|| / sum over heads: which heads a latent stands for, by the weights (Kissane et al. 2024).

    0 for all heads where the row is zero. Raises DictlearnError unless `dictionary` writes attn_z.L alone.
    """
    _check_z(model, dictionary, dictionary.writes, "decoder")
    return _shares(dictionary.W_dec.detach(), n_heads(model))


def encoder_shares(model: PreTrainedModel, dictionary: Dictionary) -> ByHead:
    """||W_enc[head h, i]|| / sum over heads: which heads a latent reads, by the weights.

    0 for all heads where the column is zero. Raises DictlearnError unless `dictionary` reads attn_z.L alone, by a
    linear encoder.
    """
    heads_read(model, dictionary)
    _check_z(model, dictionary, dictionary.reads, "encoder")
    return _shares(dictionary.W_enc.detach().T, n_heads(model))


def _shares(weights: Float[Tensor, "n_latents d"], heads: int) -> ByHead:
    norms = weights.unflatten(-1, (heads, -1)).norm(dim=-1)
    total = norms.sum(-1, keepdim=True)
    return norms / torch.where(total > 0, total, 1.0)


def _check_z(model: PreTrainedModel, dictionary: Dictionary, sites: Sequence[str], part: str) -> None:
    if dictionary.site_axis or layer_at(model, resolve(model, sites[0]), ("attn_z",)) is None:
        raise DictlearnError(
            f"Shares of heads in the {part} need a dictionary with attn_z.L there, where heads stand side by side, "
            f"got {', '.join(sites)}."
        )

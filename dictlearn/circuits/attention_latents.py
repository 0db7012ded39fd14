"""Latents of what attention writes, by head and source position (Kissane et al. 2024, arXiv 2406.17759).

With the patterns P and the denominators of norms as they are on a prompt, the heads' outputs are linear in the
values v, and these in the stream. So the pre-activation of latent i at position t is exactly

    pre_i[t] = bias_i[t] + sum over heads h and sources s of scale[t] * P_h[t, s] * (v_h[s] . direction_ih)
    v_h[s] = (stream[s] . W'_h) / denominator[s] + constant_h

`direction_ih` is the encoder's column, in a head's own space. The first line is direct feature attribution; with
the second one, and the stream as a sum over the latents of another dictionary, it is continued into these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.checks import check_count
from dictlearn.circuits.cuts import Cut
from dictlearn.circuits.dictionary_maps import check_linear, decoder_rows, encoder_columns, token_norm
from dictlearn.circuits.freeze import recorded
from dictlearn.circuits.heads import CHUNK
from dictlearn.circuits.parts import layer_at
from dictlearn.circuits.weights import Attention, LinearMaps, Norm
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import activations, resolve
from dictlearn.types import DictlearnError, SparseLatents, TokenIds

HEADS = ("attn_z", "attn_out")  # sites that are sums over heads and source positions
ByHead = Float[Tensor, "n_latents n_heads"]
ByHeadAndSource = Float[Tensor, "rows n_positions n_latents n_heads ctx"]
PerLatent = Float[Tensor, "rows n_positions n_latents"]


class DirectAttribution(NamedTuple):
    """What each head contributes to pre-activations, from each source position.

    `contributions` summed over heads and sources, plus `bias`, are `pre_acts`. Axes are the rows of the token ids,
    `positions` (destinations, from 0), `latents`, heads and sources; those after the destination contribute 0.
    `bias` is b_enc, and of attn_out what the biases of the output projection and of a norm after it add.
    `latent_values` are those of the latents, after the sparsifier.
    """

    latents: Int[Tensor, " n_latents"]
    positions: Int[Tensor, " n_positions"]
    contributions: ByHeadAndSource
    bias: PerLatent
    pre_acts: PerLatent
    latent_values: PerLatent

    def table(self, n: int = 20) -> pd.DataFrame:
        """The `n` contributions that are largest in size: row, position, latent, head, source, contribution."""
        values, (row, position, latent, head, source) = _largest(self.contributions, n)
        places = {"row": row, "position": self.positions[position], "latent": self.latents[latent]}
        return _frame(places | {"head": head, "source": source, "contribution": values})


class RecursiveAttribution(NamedTuple):
    """What a value at a source position contributes to pre-activations, by what the stream is made of there.

    `code`: the active latents of the stream's dictionary at all `rows * ctx` tokens (values times what an input
    norm took off the token). `contributions` are those of each one, from its token, to the destinations in its own
    row. `errors`: of what the dictionary does not reconstruct (a skip path included). `bias`: of its bias, and of
    the biases of the model's norm and values. The three add up to `DirectAttribution.contributions`: see `total`.
    """

    latents: Int[Tensor, " n_latents"]
    positions: Int[Tensor, " n_positions"]
    code: SparseLatents
    contributions: Float[Tensor, "n_positions n_latents n_heads nnz"]
    errors: ByHeadAndSource
    bias: ByHeadAndSource

    def total(self) -> ByHeadAndSource:
        """The contribution of each head and source position: the sum of all three."""
        rows, *_, ctx = self.errors.shape
        of_latents = self.contributions.new_zeros(*self.contributions.shape[:-1], rows * ctx)
        of_latents.index_add_(-1, _tokens(self.code), self.contributions)
        return of_latents.unflatten(-1, (rows, ctx)).movedim(-2, 0) + self.errors + self.bias

    def table(self, n: int = 20) -> pd.DataFrame:
        """The `n` contributions of latents that are largest in size: row, position, latent, head, source,
        stream_latent, contribution.
        """
        ctx = self.errors.shape[-1]
        values, (position, latent, head, entry) = _largest(self.contributions, n)
        token = _tokens(self.code)[entry]
        places = {"row": token // ctx, "position": self.positions[position], "latent": self.latents[latent]}
        more = {"head": head, "source": token % ctx, "stream_latent": self.code.indices[entry]}
        return _frame(places | more | {"contribution": values})


def heads_read(model: PreTrainedModel, dictionary: Dictionary) -> tuple[int, str]:
    """The layer whose heads `dictionary` reads, and at which of `HEADS`.

    Raises DictlearnError for another read site, several ones, and an encoder that is not linear.
    """
    check_linear(dictionary, "Direct feature attribution needs")
    found = layer_at(model, resolve(model, dictionary.reads[0]), HEADS)
    if found is None:
        raise DictlearnError(
            "Direct feature attribution needs a dictionary that reads what heads write, at attn_z.L or attn_out.L; "
            f"got one that reads {dictionary.reads[0]}."
        )
    return found


@torch.no_grad()
def direct_feature_attribution(
    maps: LinearMaps,
    dictionary: Dictionary,
    ids: TokenIds,
    latents: Sequence[int],
    positions: Sequence[int] | None = None,
) -> DirectAttribution:
    """How much each head adds to the pre-activations of `latents` from each source position; exact.

    Patterns and the denominators of norms (of Gemma-2 after attention, of the dictionary's `input_norm`) are those
    of the prompt; the sliding windows and softcaps of attention are in its patterns.

    Args:
        maps: of the model: `linear_maps(model)`.
        dictionary: reads attn_z.L or attn_out.L.
        ids: rows without padding.
        positions: destinations; negative ones count from the end; None: all.

    The result has rows * positions * latents * heads * ctx numbers.

    Raises DictlearnError for a dictionary with another read site, several ones, or an encoder that is not linear,
    and for latents or positions that do not exist.
    """
    found = _heads_on(maps, dictionary, ids, latents, positions)
    along = torch.einsum("bhsz,nhz->bnhs", found.values, found.directions)
    contributions = torch.einsum("bphs,bnhs->bpnhs", found.flow, along)
    x = found.acts[dictionary.reads[0]][:, found.positions].flatten(0, 1)
    rows = dictionary.latent_rows(found.latents)
    pre_acts = dictionary.row_pre_acts(dictionary.normalise(x), rows, found.latents)
    values = dictionary.encode(x)[:, found.latents]
    pre_acts, values = (one.view_as(found.bias).to(found.bias) for one in (pre_acts, values))
    return DirectAttribution(found.latents, found.positions, contributions, found.bias, pre_acts, values)


@torch.no_grad()
def recursive_feature_attribution(
    maps: LinearMaps,
    dictionary: Dictionary,
    stream: Dictionary,
    ids: TokenIds,
    latents: Sequence[int],
    positions: Sequence[int] | None = None,
) -> RecursiveAttribution:
    """Direct feature attribution continued into the latents of `stream` at each source position; exact.

    Of head h and source s, latent r of the stream's dictionary contributes scale[t] * P_h[t, s] * a_r[s] *
    (W_dec_r . W'_h direction_ih) / denominator[s]. Kissane et al. leave the norm before attention out, which is
    frozen here.

    Args:
        stream: writes resid_pre.L of the layer that `dictionary` reads, or resid_post.(L-1), which is the same.
        others: as of `direct_feature_attribution`.

    Raises DictlearnError like `direct_feature_attribution`, and where `stream` writes another site.
    """
    layer, _ = heads_read(maps.model, dictionary)
    cut = _stream_cut(maps.model, stream, layer)
    found = _heads_on(maps, dictionary, ids, latents, positions, cut)
    own, like = found.attention, found.values
    through = torch.einsum("nhz,hdz->nhd", found.directions, own.W_V)
    folded = own.norm.folded(through)  # what a head reads for a latent, [n_latents, n_heads, d]
    constant = through @ own.norm.bias + torch.einsum("nhz,hz->nh", found.directions, own.b_V)
    inverse = found.source_inverse.squeeze(-1)  # [rows, ctx]

    x = stream.select_reads(found.acts)
    code = cut.values(found.acts)
    bias = cut.bias(x).squeeze(-2).to(like)
    error = found.acts[cut.writes[0].name].to(like) - cut.written(code).view_as(bias).to(like) - bias

    def from_sources(vectors: Float[Tensor, "rows ctx d"]) -> Float[Tensor, "rows n_latents n_heads ctx"]:
        return torch.einsum("bs,bsd,nhd->bnhs", inverse, vectors, folded)

    def arrived(along: Float[Tensor, "rows n_latents n_heads ctx"]) -> ByHeadAndSource:
        return torch.einsum("bphs,bnhs->bpnhs", found.flow, along)

    stored, which = code.indices.unique(return_inverse=True)
    rows = decoder_rows(stream, stored).to(like)
    along = torch.einsum("rd,nhd->rnh", rows, folded)[which]  # [nnz, n_latents, n_heads]
    token = _tokens(code)
    row, source = token // ids.shape[1], token % ids.shape[1]
    sent = code.values.to(like) * inverse[row, source]
    flow = found.flow.permute(0, 3, 1, 2)[row, source]  # [nnz, n_positions, n_heads]
    return RecursiveAttribution(
        found.latents,
        found.positions,
        code,
        torch.einsum("j,jph,jnh->pnhj", sent, flow, along),
        arrived(from_sources(error)),
        arrived(from_sources(bias) + constant.unsqueeze(-1)),
    )


@torch.no_grad()
def head_attribution(
    maps: LinearMaps, dictionary: Dictionary, ids: TokenIds, positions: Sequence[int] | None = None
) -> ByHead:
    """What each head adds to the pre-activation of every latent where it is active (not zero): direct feature
    attribution summed over sources, the mean over the tokens of `ids` at `positions`, active or not.

    Raises like `direct_feature_attribution`.
    """
    total = torch.zeros((), dtype=maps.unembedding.dtype, device=maps.model.device)
    n_tokens = 0
    for some in ids.split(CHUNK):
        found = _heads_on(maps, dictionary, some, range(dictionary.n_latents), positions)
        x = found.acts[dictionary.reads[0]][:, found.positions]
        code = dictionary.encode_sparse(x.flatten(0, 1))
        written = torch.einsum("bphs,bhsz->bphz", found.flow, found.values)
        written = written.flatten(0, 1)  # [n_tokens, n_heads, d_head]
        active = code.values != 0
        where = torch.zeros_like(found.directions)
        where.index_add_(0, code.indices[active], written[_tokens(code)[active]])
        total = total + (where * found.directions).sum(-1)
        n_tokens += len(written)
    return total / n_tokens


# -- one layer's attention on prompts --


class _Heads(NamedTuple):
    """A layer's heads on prompts, as latents read them: `flow` = scale * pattern at the destinations.

    A head adds flow[t, s] * (values[s] . direction) to a pre-activation. `source_inverse`: one over the denominator
    of the norm before attention.
    """

    attention: Attention
    latents: Int[Tensor, " n_latents"]
    positions: Int[Tensor, " n_positions"]
    directions: Float[Tensor, "n_latents n_heads d_head"]
    flow: Float[Tensor, "rows n_positions n_heads ctx"]
    values: Float[Tensor, "rows n_heads ctx d_head"]
    bias: PerLatent
    source_inverse: Float[Tensor, "rows ctx 1"]
    acts: dict[str, Tensor]


def _heads_on(
    maps: LinearMaps,
    dictionary: Dictionary,
    ids: TokenIds,
    latents: Sequence[int],
    positions: Sequence[int] | None,
    cut: Cut | None = None,
) -> _Heads:
    model, ctx = maps.model, ids.shape[1]
    layer, kind = heads_read(model, dictionary)
    own = maps.attentions[layer]
    chosen = _chosen("latents", latents, 0, dictionary.n_latents).to(model.device)
    places = _chosen("positions", range(ctx) if positions is None else positions, -ctx, ctx).to(model.device) % ctx
    attn_in, read = resolve(model, f"attn_in.{layer}"), resolve(model, dictionary.reads[0])
    sites = {site.name: site for site in (attn_in, read, *(cut.sites.values() if cut else ()))}
    with recorded(model) as frozen:
        acts = activations(model, list(sites.values()), ids.to(model.device))
    source = acts[attn_in.name].to(own.W_V)
    values = torch.einsum("bsd,hdz->bhsz", source, own.W_V) + own.b_V.unsqueeze(1)

    def inverse(norm: Norm) -> Float[Tensor, "rows ctx 1"]:
        return torch.ones_like(source[..., :1]) if norm.module is None else frozen.scales[norm.module].to(source)

    columns = encoder_columns(dictionary, chosen).to(source)
    scale = 1 / token_norm(dictionary, acts[read.name]).divisor.to(source)
    bias = dictionary.b_enc[chosen].to(source).expand(*ids.shape, -1)
    if kind == "attn_z":
        directions = columns.unflatten(-1, (len(own.W_O), -1))
    else:
        folded, after = own.post.folded(columns), inverse(own.post)
        directions = torch.einsum("nd,hzd->nhz", folded, own.W_O)
        bias = bias + scale * (columns @ own.post.bias + after * (folded @ own.b_O))
        scale = scale * after
    pattern = frozen.patterns[model.get_submodule(attn_in.module)].to(source)
    flow = (pattern * scale.unsqueeze(1))[:, :, places].transpose(1, 2)
    return _Heads(own, chosen, places, directions, flow, values, bias[:, places], inverse(own.norm), acts)


def _tokens(code: SparseLatents) -> Int[Tensor, " nnz"]:
    """The token of each stored latent."""
    return torch.repeat_interleave(code.offsets.diff(), output_size=len(code.indices))


# -- sites and checks --


def _stream_cut(model: PreTrainedModel, stream: Dictionary, layer: int) -> Cut:
    cut = Cut(model, "stream", stream)
    names = [f"resid_pre.{layer}", *([f"resid_post.{layer - 1}"] if layer else [])]
    if [site[1:] for site in cut.writes] not in [[resolve(model, name)[1:]] for name in names]:
        raise DictlearnError(
            f"Values of layer {layer} are continued into a dictionary that writes {' or '.join(names)} alone, got "
            f"one that writes {', '.join(stream.writes)}."
        )
    return cut


def _chosen(name: str, given: Sequence[int], first: int, end: int) -> Int[Tensor, " n"]:
    outside = [number for number in given if not first <= number < end]
    if outside or not len(given):
        raise DictlearnError(f"{name} must be one or more of {first} to {end - 1}, got {outside or 'none'}.")
    return torch.tensor(list(given))


def _largest(values: Float[Tensor, "*axes"], n: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The `n` entries that are largest in size, and where they are along each axis; no zeros."""
    check_count("n", n)
    flat = values.flatten()
    found = flat.abs().topk(min(n, len(flat))).indices
    found = found[flat[found] != 0]
    return flat[found], torch.unravel_index(found, values.shape)


def _frame(columns: dict[str, Tensor]) -> pd.DataFrame:
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})

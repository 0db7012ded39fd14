"""What the weights alone say about a circuit: linear maps between points of the residual stream.

A latent's pre-activation reads the stream x at its token through a norm, w . norm(x) = (w' . x) / s + constant,
with s the denominator there and w' the encoder's column with the norm's gain and centring folded in. What adds to x
is linear, so with patterns and denominators given a contribution is a product of two factors: one of the input (a
latent's value, a pattern, 1 / s), and one that the weights fix for all inputs (Dunefsky et al. 2024, arXiv
2406.11944). The functions here give the second:
    latent to latent: D_i . w'_j                    token to latent: W_E w'_j (de-embedding)
    latent to logit: D_i' W_U                       through a head: w' becomes W_V W_O w', folded again
paths.py puts both together on a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dictlearn.circuits.dictionary_maps import LatentIds, check_linear, decoder_rows, encoder_columns
from dictlearn.circuits.parts import (
    GAINS,
    STREAM,
    is_norm,
    is_parallel,
    layer_at,
    modules_at,
    n_layers,
    output_weight,
    parts_of,
    widened,
)
from dictlearn.circuits.surgery import attention
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries._input_norm import undone
from dictlearn.lm import resolve
from dictlearn.lm.taps import activations, capture, edit
from dictlearn.types import DictlearnError, Site

Directions = Float[Tensor, "n d"]
CHUNK = 4096  # tokens embedded at once


class Norm(NamedTuple):
    """gain * (x - mean x, where centred) / denominator + bias: what of a norm does not depend on the input.

    `module`: of the language model; None where nothing stands there.
    """

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    centred: bool
    module: nn.Module | None = None

    def folded(self, directions: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """w' with w . norm(x) = (w' . x) / denominator + w . bias."""
        scaled = directions * self.gain
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled


class Attention(NamedTuple):
    """One layer's attention at given patterns: `norm`, values, outputs, and the norm before the stream, if any.

    Heads of a group have copies of its values.
    """

    norm: Norm
    W_V: Float[Tensor, "n_heads d d_head"]
    b_V: Float[Tensor, "n_heads d_head"]
    W_O: Float[Tensor, "n_heads d_head d"]
    b_O: Float[Tensor, " d"]
    post: Norm


class Place(NamedTuple):
    """A point of the stream: how many attentions and how many MLPs have been added to it."""

    n_attentions: int
    n_mlps: int


class Reading(NamedTuple):
    """Where a dictionary reads the stream, and the model's norm that it reads through, if any."""

    place: Place
    norm: Norm


class LinearMaps(NamedTuple):
    """The linear maps of a model between points of its residual stream, in float32 or wider; see `linear_maps`."""

    model: PreTrainedModel
    attentions: list[Attention]
    mlp_norms: list[Norm]
    final_norm: Norm
    unembedding: Float[Tensor, "vocab d"]
    b_logits: Float[Tensor, " vocab"]

    @property
    def end(self) -> Place:
        """What the final norm reads."""
        return Place(len(self.attentions), len(self.attentions))

    def before_mlp(self, layer: int) -> Place:
        return Place(layer if is_parallel(self.model) else layer + 1, layer)


@torch.no_grad()
def linear_maps(model: PreTrainedModel) -> LinearMaps:
    """The linear maps of `model`, found by two forwards: which norm stands before which module, and the gradients
    of values, which are exactly their weights, so that fused and grouped projections need no care.

    Raises DictlearnError for a family or a module that is not known, in training mode, and where norms stand on the
    residual stream itself (opt-350m).
    """
    parts_of(model)
    layers = range(n_layers(model))
    posts = [model.get_submodule(resolve(model, f"attn_out.{layer}").module) for layer in layers]
    before = _norms_before(model)
    values = _values(model)
    attentions = []
    for layer in layers:
        W_V, b_V = values[layer]
        W_O = widened(output_weight(model, layer)).unflatten(0, (len(W_V), -1))
        bias = getattr(modules_at(model, "attn_z", layer), "bias", None)
        b_O = torch.zeros_like(W_O[0, 0]) if bias is None else widened(bias)
        post = posts[layer] if is_norm(posts[layer]) else None
        attentions.append(
            Attention(_norm(model, before[f"attn_in.{layer}"]), W_V, b_V, W_O, b_O, _norm(model, post))
        )
    head = _unembedding(model)
    W_U, b_U = widened(head.get_parameter("weight")), getattr(head, "bias", None)
    return LinearMaps(
        model,
        attentions,
        [_norm(model, before[f"mlp_in.{layer}"]) for layer in layers],
        _norm(model, before["logits"]),
        W_U,
        torch.zeros_like(W_U[:, 0]) if b_U is None else widened(b_U),
    )


def _norm(model: PreTrainedModel, module: nn.Module | None) -> Norm:
    d, like = model.config.get_text_config().hidden_size, widened(_unembedding(model).get_parameter("weight")[0])
    gain, bias = like.new_ones(d), like.new_zeros(d)
    if module is not None and getattr(module, "weight", None) is not None:
        gain = widened(module.get_parameter("weight")) + GAINS.get(type(module).__name__, 0.0)
    if getattr(module, "bias", None) is not None:
        assert module is not None
        bias = widened(module.get_parameter("bias"))
    return Norm(gain, bias, isinstance(module, nn.LayerNorm), module)


def _unembedding(model: PreTrainedModel) -> nn.Module:
    found = model.get_output_embeddings()
    if found is None:
        raise DictlearnError(f"{type(model).__name__} has no unembedding: weights need a model that gives logits.")
    return found


def _norms_before(model: PreTrainedModel) -> dict[str, nn.Module | None]:
    """The norm whose very output each attention, each MLP and the unembedding are given; None: there is none."""
    kinds = ("attn_in", "mlp_in")
    sites = [resolve(model, f"{kind}.{layer}") for kind in kinds for layer in range(n_layers(model))]
    head = _unembedding(model)
    path = next(path for path, module in model.named_modules() if module is head)
    outputs: list[tuple[nn.Module, Tensor]] = []  # kept, so that no memory is used twice

    def hook(module: nn.Module, _: object, output: Tensor) -> None:
        outputs.append((module, output))

    handles = [norm.register_forward_hook(hook) for norm in parts_of(model).norms]
    try:
        with capture(model, [*sites, Site("logits", path, "in")]) as acts:
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    owners = {output.data_ptr(): module for module, output in outputs}
    return {name: owners.get(act.data_ptr()) for name, act in acts.items()}


def _values(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """W_V `[n_heads, d, d_head]` and b_V of each layer: the gradients of its values, and its values on zero."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def mix(module: nn.Module, pattern: Tensor, value: Tensor) -> Tensor:
        own = value[0, :, 0]  # [n_heads, d_head]
        W_V = _gradients(own.flatten(), leaves[-1]).unflatten(0, own.shape)
        found[module] = W_V.transpose(1, 2), widened(own.detach())
        return torch.zeros_like(pattern @ value)

    sites = [resolve(model, f"attn_in.{layer}") for layer in range(n_layers(model))]
    with attention(model, mix), _zeros_at(model, sites) as leaves:
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return [found[module] for module in parts_of(model).attentions]


@contextmanager
def _zeros_at(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[list[Tensor]]:
    """Leaves that are zero in place of the activations at sites, in the order in which they are reached."""
    leaves: list[Tensor] = []

    def zeros(act: Tensor) -> Tensor:
        leaves.append(torch.zeros_like(act).requires_grad_())
        return leaves[-1]

    with torch.inference_mode(mode=False), torch.enable_grad(), edit(model, dict.fromkeys(sites, zeros)):
        yield leaves


def _gradients(values: Float[Tensor, " n"], leaf: Float[Tensor, "1 1 d"]) -> Float[Tensor, "n d"]:
    """Of `values`, linear in `leaf`: exactly its weights, which values in bfloat16 have lost some digits of."""
    ones = torch.eye(len(values), dtype=values.dtype, device=values.device)
    (found,) = torch.autograd.grad(values, leaf, ones, is_grads_batched=True)
    return widened(found[:, 0, 0])


# -- dictionaries in the stream --


def reading(maps: LinearMaps, dictionary: Dictionary) -> Reading:
    """Where `dictionary` reads the stream.

    Raises DictlearnError unless it has a linear encoder of one site, which is mlp_in or a point of the residual
    stream before it (resid_mid, resid_pre, resid_post), and no norm but the language model's.
    """
    check_linear(dictionary, "Weights of latents need")
    if undone(dictionary.input_norm):
        raise DictlearnError(
            "Weights of latents need an input_norm that is not undone (none, rms_norm, lm_layer_norm), got "
            f"{dictionary.input_norm!r}."
        )
    layer, kind = _layer_at(maps, dictionary.reads[0], STREAM)
    place = {"resid_pre": Place(layer, layer), "resid_post": Place(layer + 1, layer + 1)}.get(
        kind, maps.before_mlp(layer)
    )
    return Reading(place, maps.mlp_norms[layer] if kind == "mlp_in" else _norm(maps.model, None))


def written_at(maps: LinearMaps, dictionary: Dictionary) -> Place:
    """The last point of the stream that lacks what `dictionary` writes to attn_out or mlp_out.

    Raises DictlearnError for other or several write sites.
    """
    if dictionary.site_axis:
        raise DictlearnError(
            f"Weights of latents are for one write site, got {', '.join(dictionary.writes)}; of cross-layer "
            "transcoders there are attribution graphs: see dictlearn.circuits.graphs."
        )
    layer, kind = _layer_at(maps, dictionary.writes[0], ("attn_out", "mlp_out"))
    return Place(layer, layer) if kind == "attn_out" else maps.before_mlp(layer)


def _layer_at(maps: LinearMaps, name: str, kinds: tuple[str, ...]) -> tuple[int, str]:
    found = layer_at(maps.model, resolve(maps.model, name), kinds)
    if found is None:
        raise DictlearnError(f"Weights of latents need a site {', '.join(kinds)} here, got {name!r}.")
    return found


def encoder_directions(maps: LinearMaps, dictionary: Dictionary, latents: LatentIds | None = None) -> Directions:
    """w'_j: encoder columns in the stream, the norm's gain and centring folded in. Raises like `reading`."""
    norm = reading(maps, dictionary).norm
    return norm.folded(encoder_columns(dictionary, latents).to(norm.gain))


def virtual_weights(
    maps: LinearMaps,
    source: Dictionary,
    target: Dictionary,
    sources: Int[Tensor, " n_sources"] | None = None,
    targets: Int[Tensor, " n_targets"] | None = None,
) -> Float[Tensor, "n_sources n_targets"]:
    """D_i . w'_j: what latent i of `source` of value 1 adds to the pre-activation of latent j of `target` at the
    same token, times the denominators of the norms before `target`. For chosen latents, or all of them.

    Raises DictlearnError where `source` writes after `target` reads, and like `reading`.
    """
    if not _reaches(written_at(maps, source), reading(maps, target).place):
        raise DictlearnError(
            f"A source must write before the target reads: {source.writes[0]} is not in what "
            f"{target.reads[0]} sees."
        )
    directions = encoder_directions(maps, target, targets)
    return decoder_rows(source, sources).to(directions) @ directions.T


def _reaches(written: Place, read: Place) -> bool:
    return written != read and all(w <= r for w, r in zip(written, read, strict=True))


# -- tokens, logits, heads --


@torch.no_grad()
def de_embedding(maps: LinearMaps, directions: Directions) -> Float[Tensor, "n vocab"]:
    """What each token's embedding, without a position, adds along directions in the stream; for the encoder
    directions of latents: which tokens activate them directly.
    """
    embed = resolve(maps.model, "embed")
    before = directions @ _from_embedding(maps.model).to(directions)
    found = []
    for ids in torch.arange(len(maps.unembedding), device=maps.model.device).split(CHUNK):
        rows = activations(maps.model, [embed], ids[:, None])[embed.name]
        found.append(before @ rows[:, 0].to(before).T)
    return torch.cat(found, dim=-1)


def _from_embedding(model: PreTrainedModel) -> Float[Tensor, "d d_embed"]:
    """What becomes of a token's embedding before the first layer; positions are added to it."""
    start, ids = resolve(model, "resid_pre.0"), torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with _zeros_at(model, [resolve(model, "embed")]) as leaves, capture(model, [start]) as acts:
        model.base_model(input_ids=ids, use_cache=False)
        return _gradients(acts[start.name][0, 0], leaves[0])


def logit_effects(maps: LinearMaps, directions: Directions) -> Float[Tensor, "n vocab"]:
    """What directions in the stream add to the logits, times the final norm's denominator, about the mean over the
    vocabulary; for decoder rows: which tokens latents promote directly. Before a softcap.
    """
    logits = maps.final_norm.folded(maps.unembedding) @ directions.to(maps.unembedding).T  # [vocab, n]
    return (logits - logits.mean(0)).T


def through_heads(maps: LinearMaps, layer: int, directions: Directions) -> Float[Tensor, "n n_heads d"]:
    """Directions after a layer's attention, pulled back through each head to the stream before it.

    On a prompt times pattern[dst, src], over the denominator of the norm before attention at src (and over that of
    the norm after it at dst, where there is one). Values have biases, which are not in it.
    """
    own = maps.attentions[layer]
    z = torch.einsum("nd,hzd->nhz", own.post.folded(directions), own.W_O)
    return own.norm.folded(torch.einsum("nhz,hdz->nhd", z, own.W_V))

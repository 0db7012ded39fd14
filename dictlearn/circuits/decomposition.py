"""The decomposition of one prompt: what every source of the residual stream contributes to what reads it.

With the patterns and the denominators of the norms as they are on the prompt, what reads the stream is a sum over
sources, exactly: the latents of transcoders, what these leave over (error, bias, skip path), MLPs without a
transcoder, heads from each source token, biases, and the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dictlearn.circuits.dictionary_maps import decoder_rows, encoder_columns, skipped, token_norm, written_bias
from dictlearn.circuits.freeze import recorded
from dictlearn.circuits.parts import layer_at, parts_of
from dictlearn.circuits.weights import LinearMaps, Norm, Place, Reading, reading, written_at
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture
from dictlearn.types import DictlearnError, Scalar, TokenIds


@dataclass(frozen=True)
class Source:
    """What adds to the stream, at a position.

    `kind`: "latent" (`index` among those of its layer's transcoder), "head" (`index`; it reads `source`),
    "embedding" (with the position's, where the model has them), "mlp" (of a layer without transcoder). Then what a
    transcoder leaves over, "error" and "skip", and constants: "attn_bias", "dec_bias", and the reader's own "bias".
    `layer` and `index` are -1 where there is none.
    """

    kind: str
    layer: int
    index: int
    position: int
    source: int

    def __str__(self) -> str:
        where = f"@{self.position}" if self.source == self.position else f"@{self.position} from @{self.source}"
        number = "".join(f".{n}" for n in (self.layer, self.index) if n >= 0).removeprefix(".")
        return " ".join(part for part in (self.kind, number, where) if part)


@dataclass(frozen=True)
class Reader:
    """What reads the stream: value = direction . stream[position] + bias, at a point of the stream."""

    place: Place
    position: int
    direction: Float[Tensor, " d"]
    bias: Scalar

    def times(self, factor: float | Tensor) -> Reader:
        return replace(self, direction=self.direction * factor, bias=self.bias * factor)


class Transcoded(NamedTuple):
    """One layer's transcoder on the prompt: `divisor` is that of its input norm, `outputs`, by kind, are what of
    mlp_out the latents do not write.
    """

    name: str
    dictionary: Dictionary
    reading: Reading
    divisor: Float[Tensor, "ctx 1"]
    latents: Float[Tensor, "ctx n_latents"]
    pre_acts: Float[Tensor, "ctx n_latents"]
    outputs: dict[str, Tensor]  # error, dec_bias, skip: [ctx, d]


@dataclass(frozen=True)
class Decomposition:
    """One forward of one prompt; made by `decompose`."""

    maps: LinearMaps
    embedding: Float[Tensor, "ctx d"]
    values: list[Tensor]  # by layer, [n_heads, ctx, d_head]
    patterns: list[Tensor]  # by layer, [n_heads, ctx, ctx]
    inverses: Mapping[nn.Module, Tensor]  # of each norm of the model, [ctx, 1]
    mlp_out: list[Tensor]  # by layer, [ctx, d]
    transcoders: Mapping[int, Transcoded]  # by the layer that they write to

    @property
    def ctx(self) -> int:
        return len(self.embedding)

    def inverse(self, norm: Norm) -> Float[Tensor, "ctx 1"]:
        return torch.ones_like(self.embedding[:, :1]) if norm.module is None else self.inverses[norm.module]

    def at(self, position: int) -> int:
        """A position from 0, of one that may be counted from the end."""
        if not -self.ctx <= position < self.ctx:
            raise DictlearnError(f"position must be within the {self.ctx} tokens of the prompt, got {position}.")
        return position % self.ctx


@torch.no_grad()
def decompose(maps: LinearMaps, dictionaries: Mapping[str, Dictionary], ids: TokenIds) -> Decomposition:
    """One forward of the prompt `ids [1, ctx]` and its transcoders' latents.

    Args:
        dictionaries: by name; one at most for each layer, each writing mlp_out. Other layers' MLPs are one source.

    Raises DictlearnError for several rows, for dictionaries that are not transcoders of an MLP, and for latents
    that are not their pre-activations where they are active (a gated dictionary as it is trained).
    """
    if len(ids) != 1:
        raise DictlearnError(f"One prompt at a time: ids must be [1, ctx], got {list(ids.shape)}.")
    model, layers = maps.model, range(len(maps.attentions))
    owners = _by_layer(maps, dictionaries)
    names = [f"{kind}.{layer}" for kind in ("attn_in", "mlp_out") for layer in layers]
    names += ["resid_pre.0", *(d.reads[0] for d in dictionaries.values())]
    with recorded(model) as frozen, capture(model, [resolve(model, name) for name in dict.fromkeys(names)]) as acts:
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    wide = {name: act[0].to(maps.unembedding) for name, act in acts.items()}
    attn = [wide[f"attn_in.{layer}"] for layer in layers]
    inverses = {norm: scale.reshape(-1, 1).to(maps.unembedding) for norm, scale in frozen.scales.items()}
    return Decomposition(
        maps,
        wide["resid_pre.0"],
        [x @ own.W_V + own.b_V.unsqueeze(1) for x, own in zip(attn, maps.attentions, strict=True)],
        [frozen.patterns[module][0].to(maps.unembedding) for module in parts_of(model).attentions],
        inverses,
        [wide[f"mlp_out.{layer}"] for layer in layers],
        {
            layer: _transcoded(maps, name, dictionaries[name], acts, wide[f"mlp_out.{layer}"])
            for layer, name in owners.items()
        },
    )


def _by_layer(maps: LinearMaps, dictionaries: Mapping[str, Dictionary]) -> dict[int, str]:
    owners: dict[int, str] = {}
    for name, dictionary in dictionaries.items():
        written, read = written_at(maps, dictionary), reading(maps, dictionary).place
        site = resolve(maps.model, dictionary.writes[0])
        mlp = layer_at(maps.model, site, ("mlp_out",))
        if mlp is None or read != written:
            raise DictlearnError(
                f"Paths are for transcoders from the stream before an MLP to its output (site=mlp.2), {name} reads "
                f"{dictionary.reads[0]} and writes {dictionary.writes[0]}."
            )
        layer, _ = mlp
        if layer in owners:
            raise DictlearnError(f"Each MLP takes one transcoder: {owners[layer]} and {name} write {site.name}.")
        owners[layer] = name
    return owners


def _transcoded(
    maps: LinearMaps,
    name: str,
    dictionary: Dictionary,
    acts: Mapping[str, Tensor],
    mlp_out: Float[Tensor, "ctx d"],
) -> Transcoded:
    own, like = reading(maps, dictionary), maps.unembedding
    x = acts[dictionary.reads[0]][0]
    output = dictionary(x)
    latents, pre_acts = output.latents.to(like), output.pre_acts.to(like)
    active = latents != 0
    if not torch.equal(latents[active], pre_acts[active]):
        raise DictlearnError(
            "Weights of latents need latents that are their pre-activations where they are active; those of "
            f"{name} are not. Take its for_inference()."
        )
    divisor = token_norm(dictionary, x).divisor
    bias = written_bias(dictionary).to(like).expand_as(mlp_out)
    written = {"error": mlp_out - output.recon.to(like), "dec_bias": bias}
    if (skip := skipped(dictionary, x, divisor)) is not None:
        written["skip"] = skip.to(like)
    return Transcoded(name, dictionary, own, divisor.to(like), latents, pre_acts, written)


# -- readers --


def latent_reader(prompt: Decomposition, layer: int, latent: int, position: int) -> Reader:
    """The pre-activation of a latent of the transcoder that writes to `layer`, at a position.

    Raises DictlearnError for a layer without transcoder, a latent or a position that is not there.
    """
    if layer not in prompt.transcoders:
        raise DictlearnError(
            f"Layer {layer} has no transcoder here; those that have one: {', '.join(map(str, prompt.transcoders))}."
        )
    own, position = prompt.transcoders[layer], prompt.at(position)
    column = encoder_columns(own.dictionary, torch.tensor([latent]))[0].to(prompt.embedding) / own.divisor[position]
    norm = own.reading.norm
    bias = own.dictionary.b_enc[latent].detach().to(column) + column @ norm.bias
    return Reader(own.reading.place, position, norm.folded(column) * prompt.inverse(norm)[position], bias)


def logit_reader(prompt: Decomposition, weights: Float[Tensor, " vocab"], position: int = -1) -> Reader:
    """The sum of the logits after a position, times `weights`: 1 and -1 for a difference. Before a softcap."""
    position, maps = prompt.at(position), prompt.maps
    weights = weights.to(maps.unembedding)
    direction = weights @ maps.unembedding
    bias = direction @ maps.final_norm.bias + weights @ maps.b_logits
    inverse = prompt.inverse(maps.final_norm)[position]
    return Reader(maps.end, position, maps.final_norm.folded(direction) * inverse, bias)


def behind(prompt: Decomposition, reader: Reader, source: Source) -> Reader | None:
    """What `source` reads, such that its value is what `source` contributes to `reader`; None where it reads
    nothing that could be followed. Of a latent that is its value's, so it has to be active.
    """
    if source.kind == "latent":
        own = prompt.transcoders[source.layer]
        row = decoder_rows(own.dictionary, torch.tensor([source.index]))[0]
        weight = row.to(reader.direction) @ reader.direction
        return latent_reader(prompt, source.layer, source.index, source.position).times(weight)
    if source.kind != "head":
        return None
    own = prompt.maps.attentions[source.layer]
    after = own.post.folded(reader.direction) * prompt.inverse(own.post)[reader.position]
    z = own.W_O[source.index] @ after * prompt.patterns[source.layer][source.index, reader.position, source.source]
    x = own.W_V[source.index] @ z
    direction = own.norm.folded(x) * prompt.inverse(own.norm)[source.source]
    bias = z @ own.b_V[source.index] + x @ own.norm.bias
    return Reader(Place(source.layer, source.layer), source.source, direction, bias)


# -- contributions --


def contributions(prompt: Decomposition, reader: Reader) -> dict[Source, float]:
    """What every source adds to the reader's value, active latents alone; they sum up to the value."""
    at = reader.position
    found = {Source("embedding", -1, -1, at, at): float(prompt.embedding[at] @ reader.direction)}
    for layer in range(reader.place.n_attentions):
        found |= _of_attention(prompt, reader, layer)
    for layer in range(reader.place.n_mlps):
        found |= _of_mlp(prompt, reader, layer)
    return found | {Source("bias", -1, -1, at, at): float(reader.bias)}


def _of_attention(prompt: Decomposition, reader: Reader, layer: int) -> dict[Source, float]:
    own, at = prompt.maps.attentions[layer], reader.position
    after = own.post.folded(reader.direction) * prompt.inverse(own.post)[at]
    pattern = prompt.patterns[layer][:, at, : at + 1]  # [n_heads, sources]
    values = torch.einsum("hsz,hz->hs", prompt.values[layer][:, : at + 1], own.W_O @ after)
    found = {
        Source("head", layer, head, at, s): value
        for head, row in enumerate((pattern * values).tolist())
        for s, value in enumerate(row)
    }
    return found | {
        Source("attn_bias", layer, -1, at, at): float(reader.direction @ own.post.bias + after @ own.b_O)
    }


def _of_mlp(prompt: Decomposition, reader: Reader, layer: int) -> dict[Source, float]:
    at = reader.position
    if layer not in prompt.transcoders:
        return {Source("mlp", layer, -1, at, at): float(prompt.mlp_out[layer][at] @ reader.direction)}
    own = prompt.transcoders[layer]
    active = own.latents[at].nonzero()[:, 0]
    weights = decoder_rows(own.dictionary, active).to(reader.direction) @ reader.direction
    values = own.latents[at, active] * weights
    found = {
        Source("latent", layer, latent, at, at): value
        for latent, value in zip(active.tolist(), values.tolist(), strict=True)
    }
    beside = {Source(kind, layer, -1, at, at): float(y[at] @ reader.direction) for kind, y in own.outputs.items()}
    return found | beside


def table(prompt: Decomposition, reader: Reader) -> pd.DataFrame:
    """Contributions as a table, the largest first: kind, layer, index, position, source, contribution, and of
    latents the two factors, `activation` (of the input) and `weight` (contribution over activation: the virtual
    weight over the denominator).
    """
    found = contributions(prompt, reader)
    rows = pd.DataFrame([asdict(source) | {"contribution": value} for source, value in found.items()])
    rows["activation"] = [
        float(prompt.transcoders[s.layer].latents[s.position, s.index]) if s.kind == "latent" else float("nan")
        for s in found
    ]
    rows["weight"] = rows.contribution / rows.activation
    return rows.sort_values("contribution", key=abs, ascending=False, ignore_index=True)

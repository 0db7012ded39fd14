"""A released dictionary in this package's forward rule: what its own has besides is folded into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub.weights import is_finite
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.types import FormatError


class Weights(NamedTuple):
    """Of one read and one write site, in any floating type; views of files are fine.

    Of a layer of a cross-layer transcoder W_dec has an axis of write sites before the last one.
    """

    W_enc: Float[Tensor, "d_in n_latents"]
    b_enc: Float[Tensor, " n_latents"]
    W_dec: Float[Tensor, "n_latents *n_writes d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " n_latents"] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None


@torch.no_grad()
def linear(
    path: Path,
    weights: Weights,
    sparsifier: Sparsifier | None,
    read: str,
    write: str,
    *,
    b_dec_on_input: bool = False,
    input_norm: str = "none",
    metadata: Mapping[str, Any],
) -> Linear:
    """A frozen linear dictionary in float32; weights are copied once.

    path: the file of the weights, in a message.
    sparsifier: None for relu(pre) where pre exceeds `weights.threshold`; such latents are never negative, so a
        threshold below 0 is one of 0.
    b_dec_on_input: the format's rule takes b_dec off the input before the encoder; folded into b_enc.
    """
    d_in, n_latents = weights.W_enc.shape
    made = Linear(
        d_in=d_in,
        d_out=weights.W_dec.shape[1],
        n_latents=n_latents,
        sparsifier=sparsifier or JumpReLU(penalty="l0"),
        reads=(read,),
        writes=(write,),
        skip=weights.W_skip is not None,
        decoder_norm="free",
        input_norm=input_norm,
    )
    for name, tensor in weights._asdict().items():
        if tensor is not None:
            made.get_parameter("sparsifier.threshold" if name == "threshold" else name).copy_(tensor)
    made.sparsifier.project_()
    if b_dec_on_input:
        made.b_enc.sub_(made.b_dec @ made.W_enc)
    made.metadata = dict(metadata)
    check_finite(path, made)
    return made.requires_grad_(False).eval()


def check_finite(path: Path, dictionary: Dictionary) -> None:
    """Raise FormatError where finite values of a file have overflowed on their way into the weights."""
    for name, parameter in dictionary.named_parameters():
        if not is_finite(parameter.detach()):
            raise FormatError(f"{path}: the values are too large: {name} would not be finite in {parameter.dtype}.")


class Gate(NamedTuple):
    """What the gates of a gated dictionary are as thresholds on its magnitudes."""

    growth: Float[Tensor, " n_latents"]  # of W_enc
    b_enc: Float[Tensor, " n_latents"]
    threshold: Float[Tensor, " n_latents"]


def gate(
    b_gate: Float[Tensor, " n_latents"], r_mag: Float[Tensor, " n_latents"], b_mag: Float[Tensor, " n_latents"]
) -> Gate:
    """Of latents = 1[p + b_gate > 0] * relu(exp(r_mag) * p + b_mag), with p = x @ W_enc, as a JumpReLU.

    With a = growth * p + b_mag the gate is open where a > b_mag - growth * b_gate.
    """
    growth = r_mag.float().exp()
    return Gate(growth, b_mag, b_mag - growth * b_gate)


class LayerSizes(NamedTuple):
    """Widths of a cross-layer transcoder; `n_latents` are those of one layer."""

    d_in: int
    d_out: int
    n_latents: int


@torch.no_grad()
def cross_layer(
    path: Path,
    sizes: LayerSizes,
    layers: Iterable[Weights],
    sparsifier: Sparsifier | None,
    reads: Sequence[str],
    writes: Sequence[str],
    *,
    skip: bool = False,
    metadata: Mapping[str, Any],
) -> CrossLayer:
    """A frozen cross-layer transcoder in float32, from one layer after the other, of which each is copied once.

    path: the first of the files, in a message.
    sparsifier: as in `linear`; each layer has one of its own.
    """
    made = CrossLayer(
        d_in=sizes.d_in,
        d_out=sizes.d_out,
        n_latents=sizes.n_latents * len(reads),
        sparsifier=sparsifier or JumpReLU(penalty="l0"),
        reads=reads,
        writes=writes,
        skip=skip,
        decoder_norm="free",
    )
    encoders = made.W_enc.split(sizes.n_latents, dim=-1), made.b_enc.split(sizes.n_latents)
    for i, (layer, W_enc, b_enc) in enumerate(zip(layers, *encoders, strict=True)):
        W_enc.copy_(layer.W_enc)
        b_enc.copy_(layer.b_enc)
        made.decoders[i].copy_(layer.W_dec)
        made.b_dec[i].copy_(layer.b_dec)
        if layer.threshold is not None:
            made.get_parameter(f"sparsifier._layers.{i}.threshold").copy_(layer.threshold)
        if made.W_skip is not None and layer.W_skip is not None:
            made.W_skip[i].copy_(layer.W_skip)
    made.sparsifier.project_()
    made.metadata = dict(metadata)
    check_finite(path, made)
    return made.requires_grad_(False).eval()

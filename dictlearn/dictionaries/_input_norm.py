"""Normalisation of each token by itself, before the encoder; one entry of `KINDS` for each kind.

It depends on the token, so it is never folded into weights. Kinds that are undone belong to autoencoders: the
reconstruction is put back with what was taken off the token. The others are norms of the language model that a
transcoder reads behind, without their gain and bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dictlearn.kernels import EPS, layer_norm
from dictlearn.types import DictlearnError

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

RMS_EPS = 1e-6  # of Gemma 2
LM_EPS = 1e-5  # of GPT-2


class Normed(NamedTuple):
    """`z` = (x - shift) / divisor of tokens `x` [*, d]; where the norm is undone, `recon * factor + shift` puts a
    reconstruction back, elsewhere the factor is 1.
    """

    z: Float[Tensor, "*batch d"]
    shift: Float[Tensor, "*batch 1"]
    divisor: Float[Tensor, "*batch 1"]
    factor: Float[Tensor, "*batch 1"]


class Kind(NamedTuple):
    """A way to normalise tokens, whether the reconstruction is put back (then it is for autoencoders alone), and
    whether the shift is the mean over the width; otherwise it is 0.
    """

    norm: Callable[[Tensor], Normed]
    undone: bool
    centred: bool


def _layer_norm(x: Float[Tensor, "*batch d"]) -> Normed:
    """SAELens' `layer_norm`: (x - mean) / (std + 1e-5), std unbiased; undone by the std alone, as there."""
    z, mean, std = layer_norm(x)
    return Normed(z, mean, std + EPS, std)


def _constant_norm(x: Float[Tensor, "*batch d"]) -> Normed:
    """SAELens' `constant_norm_rescale`: every token has norm sqrt(d)."""
    norm = (x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])).clamp_min(torch.finfo(x.dtype).tiny)
    return Normed(x / norm, torch.zeros_like(norm), norm, norm)


def _centre(x: Float[Tensor, "*batch d"]) -> Normed:
    """The residual stream of a model whose writing weights are centred, as TransformerLens does by default."""
    mean = x.mean(-1, keepdim=True)
    ones = torch.ones_like(mean)
    return Normed(x - mean, mean, ones, ones)


def _rms_norm(x: Float[Tensor, "*batch d"]) -> Normed:
    """TransformerLens' `hook_normalized` of models with RMSNorm: x / sqrt(mean x^2 + 1e-6)."""
    rms = (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()
    return Normed(x / rms, torch.zeros_like(rms), rms, torch.ones_like(rms))


def _lm_layer_norm(x: Float[Tensor, "*batch d"]) -> Normed:
    """TransformerLens' `hook_normalized` of models with LayerNorm: its variance is the biased one, plus 1e-5."""
    mean = x.mean(-1, keepdim=True)
    std = (x.var(-1, correction=0, keepdim=True) + LM_EPS).sqrt()
    return Normed(F.layer_norm(x, x.shape[-1:], eps=LM_EPS), mean, std, torch.ones_like(std))


KINDS = {
    "layer_norm": Kind(_layer_norm, undone=True, centred=True),
    "constant_norm_rescale": Kind(_constant_norm, undone=True, centred=False),
    "centre": Kind(_centre, undone=True, centred=True),
    "rms_norm": Kind(_rms_norm, undone=False, centred=False),
    "lm_layer_norm": Kind(_lm_layer_norm, undone=False, centred=True),
}
INPUT_NORMS = ("none", *KINDS)


def normed(kind: str, x: Float[Tensor, "*batch d"]) -> Normed:
    """Tokens normalised, and what was taken off them: nothing where `kind` is "none"."""
    if kind != "none":
        return KINDS[kind].norm(x)
    ones = torch.ones_like(x[..., :1])
    return Normed(x, torch.zeros_like(ones), ones, ones)


def undone(kind: str) -> bool:
    """Whether targets are normalised and reconstructions put back with what was taken off the tokens read."""
    return kind != "none" and KINDS[kind].undone


def centred(kind: str) -> bool:
    """Whether the mean over the width is taken off tokens."""
    return kind != "none" and KINDS[kind].centred


def check_input_norm(dictionary: Dictionary) -> None:
    """Raise DictlearnError where `dictionary.input_norm` is none that this dictionary can have."""
    kind = dictionary.input_norm
    if kind not in INPUT_NORMS:
        raise DictlearnError(f"input_norm must be one of {', '.join(INPUT_NORMS)}, got {kind!r}.")
    if kind == "none":
        return
    sites = (
        f"this {type(dictionary).__name__} reads {', '.join(dictionary.reads)} and writes "
        f"{', '.join(dictionary.writes)}: use input_norm=none."
    )
    if undone(kind) and (dictionary.site_axis or not dictionary.is_autoencoder):
        raise DictlearnError(
            f"input_norm={kind} needs an autoencoder of one site, because the reconstruction is put back with what "
            f"was taken off the token that was read; {sites}"
        )
    if dictionary.site_axis or (not undone(kind) and dictionary.is_autoencoder):
        raise DictlearnError(
            f"input_norm={kind} needs a transcoder of one read and one write site, because its reconstruction is "
            f"not put back; {sites}"
        )
    if dictionary.d_in < 2:
        raise DictlearnError(f"input_norm={kind} needs activations at least 2 wide, got {dictionary.d_in}.")

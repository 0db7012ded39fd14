"""A released dictionary in this package's forward rule: what its own has besides is folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.jump_relu import JumpReLU


class Weights(NamedTuple):
    """Of one read and one write site, in any floating type; views of files are fine."""

    W_enc: Float[Tensor, "d_in n_latents"]
    b_enc: Float[Tensor, " n_latents"]
    W_dec: Float[Tensor, "n_latents d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " n_latents"] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None


@torch.no_grad()
def linear(
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
    return made.requires_grad_(False).eval()

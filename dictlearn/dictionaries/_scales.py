"""Scales in and out of a dictionary's weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.registry import kind_of
from dictlearn.types import DictlearnError

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary


@torch.no_grad()
def start_from_(dictionary: Dictionary, other: Dictionary) -> None:
    """See `Dictionary.start_from_`."""
    mine = {"kind": dictionary.inference_kind or kind_of(dictionary), **dictionary.config()}
    theirs = {"kind": kind_of(other), **other.config()}
    shared = [key for key in mine if key in theirs or dictionary.inference_kind is None]
    if differing := [key for key in shared if key != "decoder_norm" and mine[key] != theirs.get(key)]:
        listed = ", ".join(f"{key} is {theirs.get(key)} there and {mine[key]} here" for key in differing)
        raise DictlearnError(f"A dictionary starts from one of its own kind, sites and widths: {listed}.")
    n_zero = int((other.flat_W_dec.norm(dim=-1) == 0).sum())
    if dictionary.decoder_norm == "unit" and n_zero:
        raise DictlearnError(
            f"decoder_norm=unit cannot start from rows of W_dec that are zero; {n_zero} of {dictionary.n_latents} "
            "are: use decoder_norm=free."
        )
    start = copy.deepcopy(other)
    fold(start)
    learnt = dict(start.named_parameters())
    own = {}  # what the sparsifier learns and `other` has not, in this dictionary's units already
    for name, parameter in dictionary.named_parameters():
        if name.startswith("sparsifier.") and name not in learnt:
            own[name] = parameter.clone()
        else:
            parameter.copy_(learnt[name])
    unfold(dictionary)
    if dictionary.decoder_norm == "unit":
        dictionary.move_norms_(dictionary.flat_W_dec.norm(dim=-1))
    for name, value in own.items():
        dictionary.get_parameter(name).copy_(value)


def fold(dictionary: Dictionary) -> None:
    """Move `read_scale` and `write_scale` into the weights and set them to one."""
    read, write = dictionary.read_scale.clone(), dictionary.write_scale.clone()
    _rescale_weights(dictionary, read, 1 / write)
    dictionary.read_scale.fill_(1.0)
    dictionary.write_scale.fill_(1.0)


def unfold(dictionary: Dictionary) -> None:
    """The inverse: from weights in raw units to weights for the scales that are set."""
    _rescale_weights(dictionary, 1 / dictionary.read_scale, dictionary.write_scale)


def _rescale_weights(
    dictionary: Dictionary, reads: Float[Tensor, " n_reads"], writes: Float[Tensor, " n_writes"]
) -> None:
    """Multiply what the weights read by `reads` and what they write by `writes`.

    With one write site the latents are multiplied as well, and the rows of W_dec keep their norms.
    """
    per_read = reads.unsqueeze(-1) if dictionary.site_axis else reads
    per_write = writes.unsqueeze(-1) if dictionary.site_axis else writes
    dictionary.scale_reads_(per_read)
    dictionary.scale_writes_(per_write)
    if len(writes) == 1:
        dictionary.scale_latents_(writes.expand(dictionary.n_latents))
    else:
        for rows in dictionary.decoders:
            rows.mul_(per_write[-rows.shape[1] :])

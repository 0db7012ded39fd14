"""A dictionary's linear maps between raw activations: encoder columns, decoder rows, skip path, bias.

    pre_act_i = sum over reads of (column_i . x) / divisor + b_enc_i
    written = (sum over i of latent_i * row_i + sum over reads of skipped(x, divisor) + bias) * factor (+ shift)

Read and write scales are in them, and so is the mean that an input norm takes off: taking it off a column does the
same. What is left of an input norm are numbers of each token, its `divisor`, and where it is undone `factor` and
`shift`. At a divisor that is given, such as that of another input, all is linear in x.

`x` is what one site gives; `read` and `write` are the places of sites among those of the dictionary. Everything is
float32 or wider.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.circuits.parts import widened
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries._input_norm import Normed, centred, normed
from dictlearn.types import DictlearnError

LatentIds = Int[Tensor, " n"]


def check_linear(dictionary: Dictionary, what: str) -> None:
    """Raises DictlearnError, in the name of `what`, unless pre-activations are linear in what one site gives."""
    if dictionary.site_axis or not dictionary.linear_encoder:
        raise DictlearnError(
            f"{what} a linear encoder of one read site, not that of a {type(dictionary).__name__} that reads "
            f"{', '.join(dictionary.reads)}. Those of Bilinear are quadratic: see dictlearn.circuits.bilinear; "
            "cross-layer transcoders have attribution graphs: see dictlearn.circuits.graphs."
        )


def layers_of_latents(dictionary: Dictionary, latents: LatentIds) -> LatentIds:
    """The place of the site that each latent of a cross-layer transcoder reads; 0 in other dictionaries."""
    ends = torch.tensor([len(rows) for rows in dictionary.decoders], device=latents.device).cumsum(0)
    return torch.bucketize(latents, ends, right=True)


def encoder_columns(
    dictionary: Dictionary, latents: LatentIds | None = None, read: int = 0
) -> Float[Tensor, "n d_in"]:
    """What the encoder takes the product of x with, for `latents` (None: all); zero where they do not read x.

    Raises DictlearnError for latents that are not there.
    """
    latents = _chosen(dictionary, latents)
    by_site = dictionary.flat_W_enc.detach().T.unflatten(-1, (-1, dictionary.d_in))  # [n_latents, n_reads, d_in]
    columns = widened(by_site[latents, 0 if dictionary.layered else read]) * widened(dictionary.read_scale[read])
    if dictionary.layered:
        columns = columns * (layers_of_latents(dictionary, latents) == read).unsqueeze(-1)
    return columns - columns.mean(-1, keepdim=True) if centred(dictionary.input_norm) else columns


def decoder_rows(
    dictionary: Dictionary, latents: LatentIds | None = None, write: int = 0
) -> Float[Tensor, "n d_out"]:
    """What `latents` (None: all) of value 1 write at one site; zero where they do not write there.

    Raises DictlearnError for latents that are not there.
    """
    latents = _chosen(dictionary, latents)
    found = widened(dictionary.b_dec.detach()).new_zeros(len(latents), dictionary.d_out)
    first = 0
    for rows in dictionary.decoders:
        by_site = rows.detach().reshape(len(rows), -1, dictionary.d_out)  # of the last write sites
        at = write - len(dictionary.writes) + by_site.shape[1]
        if at >= 0:
            (own,) = ((first <= latents) & (latents < first + len(rows))).nonzero(as_tuple=True)
            found[own] = widened(by_site[latents[own] - first, at])
        first += len(rows)
    return found / widened(dictionary.write_scale[write])


def _chosen(dictionary: Dictionary, latents: LatentIds | None) -> LatentIds:
    n = dictionary.n_latents
    latents = torch.arange(n) if latents is None else latents
    if len(outside := latents[(latents < 0) | (latents >= n)]):
        raise DictlearnError(f"There are latents 0 to {n - 1}, got {', '.join(map(str, outside.tolist()))}.")
    return latents.to(dictionary.b_enc.device)


def written_bias(dictionary: Dictionary, write: int = 0) -> Float[Tensor, " d_out"]:
    """What is written at one site without latents and skip path."""
    bias = dictionary.b_dec.detach().reshape(-1, dictionary.d_out)[write]
    return widened(bias) / widened(dictionary.write_scale[write])


def token_norm(dictionary: Dictionary, x: Float[Tensor, "*tokens d_in"]) -> Normed:
    """Raw tokens after the input norm; its divisor, and factor and shift (1 and 0 where there is none)."""
    return normed(dictionary.input_norm, x.to(dictionary.b_dec.dtype))


def skipped(
    dictionary: Dictionary,
    x: Float[Tensor, "*tokens d_in"],
    divisor: Float[Tensor, "*#tokens 1"],
    read: int = 0,
    write: int = 0,
) -> Float[Tensor, "*tokens d_out"] | None:
    """What the skip path from one read to one write site writes, linear in `x`; None: there is no such path."""
    if dictionary.W_skip is None or (dictionary.layered and read != write):
        return None
    by_site = dictionary.W_skip.detach().reshape(len(dictionary.writes), dictionary.d_out, -1, dictionary.d_in)
    W_skip = widened(by_site[write, :, 0 if dictionary.layered else read])
    z = x.to(W_skip.dtype)
    z = z - z.mean(-1, keepdim=True) if centred(dictionary.input_norm) else z
    z = z / divisor * widened(dictionary.read_scale[read])
    return z @ W_skip.T / widened(dictionary.write_scale[write])

"""The weights of single latents, and where they start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.types import LatentRows

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary


class Part(NamedTuple):
    """Where the parameter `name` has weights of some latents: at `places` along its `axis`."""

    name: str
    axis: int
    places: Int[Tensor, " n"]


def rows(dictionary: Dictionary, latents: Int[Tensor, " n"]) -> LatentRows:
    """See `Dictionary.latent_rows`."""
    found = {}
    for name, axis, places in dictionary.parts_of(latents):
        row = dictionary.get_parameter(name).movedim(axis, 0).index_select(0, places)
        found[name] = row.flatten(1) if row.ndim > 1 else row
    return found


@torch.no_grad()
def add_gradients_(dictionary: Dictionary, latents: Int[Tensor, " n"], rows: LatentRows) -> None:
    """See `Dictionary.add_row_gradients_`."""
    for name, axis, places in dictionary.parts_of(latents):
        weight, row = dictionary.get_parameter(name), rows[name]
        if row.grad is None or not weight.requires_grad:
            continue
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        by_latent = weight.grad.movedim(axis, 0)
        by_latent.index_add_(0, places, row.grad.view(len(places), *by_latent.shape[1:]))


def random_directions(
    n: int, sites: Sequence[str], width: int, generator: torch.Generator, bases: Mapping[str, Tensor]
) -> Float[Tensor, "n sites_times_width"]:
    """Of norm 1 over all `sites`; at those in `bases`, in the subspaces that these span (orthonormal columns)."""
    directions = torch.randn(n, len(sites), width, generator=generator)
    for place, site in enumerate(sites):
        if site in bases:
            directions[:, place] = directions[:, place].double() @ bases[site] @ bases[site].T
    directions = directions.flatten(1)
    return directions / directions.norm(dim=-1, keepdim=True)


def draw_unit_rows_(decoders: Sequence[Tensor], generator: torch.Generator) -> None:
    """Random rows of norm 1 over all that they write."""
    for rows in decoders:
        drawn = torch.randn(rows.shape, generator=generator).flatten(1)
        rows.copy_((drawn / drawn.norm(dim=-1, keepdim=True)).view_as(rows))

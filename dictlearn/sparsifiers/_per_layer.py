"""One sparsifier for each layer of a dictionary whose layers have codes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.types import DictlearnError, Encoded, Latents, Scalar, SparseLatents, Step

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary


@dataclass(frozen=True)
class LayeredStep(Step):
    """A step of several layers, whose codes side by side are `latents`.

    `encoded` are the codes by layer, `dead_in` the dead latents of each, counted from its first.
    """

    encoded: tuple[Encoded, ...] = ()
    dead_in: tuple[Tensor, ...] | None = None


class PerLayer(Sparsifier):
    """Sparsifiers of one kind and configuration side by side, each on as many successive latents."""

    def __init__(self, layers: Iterable[Sparsifier]) -> None:
        super().__init__()
        self._layers = nn.ModuleList(layers)
        first = self.layers[0]
        self.norm_weighted, self.per_token = first.norm_weighted, first.per_token
        self.n_per_layer = 0

    @property
    def layers(self) -> list[Sparsifier]:
        return cast(list[Sparsifier], list(self._layers))

    @property
    def kind(self) -> str:
        return self.layers[0].kind

    @property
    def compact(self) -> bool:  # type: ignore[override]
        return self.layers[0].compact

    @property
    def per_latent(self) -> bool:  # type: ignore[override]
        return self.layers[0].per_latent

    @property
    def signed(self) -> bool:  # type: ignore[override]
        return self.layers[0].signed

    @property
    def leaves_positive(self) -> bool:  # type: ignore[override]
        return self.layers[0].leaves_positive

    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        parts = pre_acts.tensor_split(len(self.layers), dim=-1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], dim=-1)

    def penalty(self, step: Step) -> Scalar | None:
        """The mean of those of the layers, as the reconstruction loss is the mean over their targets.

        So layers beside the others that neither read nor write what these do leave each one's balance as it is.
        """
        assert isinstance(step, LayeredStep)
        norms = cache(lambda: step.dictionary.penalty_norms().tensor_split(len(self.layers)))
        terms = []
        for i, (layer, encoded) in enumerate(zip(self.layers, step.encoded, strict=True)):
            dictionary = cast("Dictionary", _Layer(norms, i))
            dead = None if step.dead_in is None else step.dead_in[i]
            terms.append(layer.penalty(replace(step, dictionary=dictionary, dead=dead, **encoded._asdict())))
        found = [term for term in terms if term is not None]
        return torch.stack(found).sum() / len(self.layers) if found else None

    def widened(self, factor: int) -> PerLayer | None:
        found = [wider for layer in self.layers if (wider := layer.widened(factor)) is not None]
        return PerLayer(found) if found else None

    def at(self, step: int, n_steps: int) -> None:
        for layer in self.layers:
            layer.at(step, n_steps)

    def project_(self) -> None:
        for layer in self.layers:
            layer.project_()

    def restart_(self, latents: Int[Tensor, " n"]) -> list[tuple[nn.Parameter, Tensor]]:
        found, n = [], self.n_per_layer
        for i, layer in enumerate(self.layers):
            found += layer.restart_(latents[latents // n == i] - i * n)
        return found

    def bind(self, n_latents: int) -> None:
        n_layers = len(self.layers)
        if n_latents % n_layers:
            raise DictlearnError(f"n_latents must be a multiple of the {n_layers} layers, got {n_latents}.")
        for layer in self.layers:
            layer.bind(n_latents // n_layers)
        self.n_per_layer = n_latents // n_layers

    def set_units_(self, units: Float[Tensor, " n_layers"]) -> None:
        """`set_unit_` of every layer."""
        for layer, unit in zip(self.layers, units.tolist(), strict=True):
            layer.set_unit_(unit)

    def scale_latents_(self, factor: Float[Tensor, " n_latents"]) -> None:
        for layer, own in zip(self.layers, factor.tensor_split(len(self.layers)), strict=True):
            layer.scale_latents_(own)

    def for_inference(self) -> PerLayer:
        return PerLayer(layer.for_inference() for layer in self.layers)

    def config(self) -> dict[str, Any]:
        """Of each layer."""
        return self.layers[0].config()

    @classmethod
    def tiny(cls) -> PerLayer:
        raise NotImplementedError("a dictionary makes it from the sparsifier that it is given")


@dataclass
class _Layer:
    """What the penalty of a layer asks of its dictionary; `norms` are those of all layers, once one is needed."""

    norms: Callable[[], tuple[Tensor, ...]]
    layer: int

    def penalty_norms(self) -> Float[Tensor, " n_latents"]:
        return self.norms()[self.layer]


def side_by_side(parts: Sequence[Latents]) -> Latents:
    """The code over all latents of the layers: compact where the parts are, a token's entries layer by layer."""
    if not isinstance(parts[0], SparseLatents):
        return torch.cat(cast(list[Tensor], parts), dim=-1)
    layers = cast(list[SparseLatents], parts)
    offsets = torch.stack([part.offsets for part in layers]).sum(0)
    starts = offsets[:-1].clone()  # in each token, where the next layer's entries go
    places, indices, first = [], [], 0
    for part in layers:
        counts, n = part.offsets.diff(), len(part.indices)
        shift = (starts - part.offsets[:-1]).repeat_interleave(counts, output_size=n)
        places.append(torch.arange(n, device=shift.device) + shift)
        indices.append(part.indices + first)
        starts += counts
        first += part.n_latents
    place, index, values = torch.cat(places), torch.cat(indices), torch.cat([part.values for part in layers])
    values, index = (torch.empty_like(t).scatter(0, place, t) for t in (values, index))
    return SparseLatents(values, index, offsets, first)


def apart(latents: Latents, n_layers: int) -> list[Latents]:
    """The inverse of `side_by_side`."""
    if not isinstance(latents, SparseLatents):
        return list(latents.tensor_split(n_layers, dim=-1))
    size = latents.n_latents // n_layers
    found: list[Latents] = []
    for first in range(0, latents.n_latents, size):
        mine = (latents.indices >= first) & (latents.indices < first + size)
        before = torch.cat([latents.offsets.new_zeros(1), mine.cumsum(0)])  # entries of this layer
        offsets = before[latents.offsets]
        found.append(SparseLatents(latents.values[mine], latents.indices[mine] - first, offsets, size))
    return found

"""Which activations a dictionary reads and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor


class Sited:
    """Reads activations at the sites `reads` and writes reconstructions at the sites `writes`, given by name."""

    site_axis: ClassVar[bool] = False  # several read or write sites: activations have a site axis before the width
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reads and writes the same sites."""
        return self.reads == self.writes

    def select_reads(self, acts: Mapping[str, Tensor]) -> Tensor:
        """The input of this dictionary among activations by site: `[*, d_in]` or `[*, n_reads, d_in]`."""
        return self._select(acts, self.reads)

    def select_writes(self, acts: Mapping[str, Tensor]) -> Tensor:
        """The target of this dictionary among activations by site: `[*, d_out]` or `[*, n_writes, d_out]`."""
        return self._select(acts, self.writes)

    def split_writes(self, recon: Tensor) -> dict[str, Tensor]:
        """Reconstruction by write site, each `[*, d_out]`."""
        return dict(zip(self.writes, recon.unbind(-2) if self.site_axis else (recon,), strict=True))

    def _select(self, acts: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        return torch.stack([acts[name] for name in names], dim=-2) if self.site_axis else acts[names[0]]

    def _axes(self, names: Sequence[str], width: int) -> tuple[int, ...]:
        return (len(names), width) if self.site_axis else (width,)

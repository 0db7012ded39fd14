"""The crosscoder: one code for several sites (Lindsey et al. 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch

from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.top_k import TopK


class Crosscoder(Linear):
    """A linear dictionary whose reads and writes are lists of sites of equal width.

    One selection per token serves all sites: encoders are summed over read sites before the sparsifier, and each
    latent has one decoder row per write site. Activations are `[*, n_sites, d]`.
    """

    site_axis: ClassVar[bool] = True

    @classmethod
    def tiny(cls) -> Crosscoder:
        sites = ("a", "b")
        tiny = cls(d_in=6, d_out=6, n_latents=16, sparsifier=TopK(k=4), reads=sites, writes=sites)
        tiny.initialise_(torch.Generator().manual_seed(0), torch.zeros(2, 6), torch.zeros(2, 6))
        return tiny

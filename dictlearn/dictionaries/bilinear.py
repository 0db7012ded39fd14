"""The bilinear dictionary: pre-activations are the product of two linear maps (Pearce et al., arXiv 2410.08417)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import Encoded, LatentRows, SparseLatents


class Bilinear(Linear):
    """pre = (x~ @ W_enc + b_enc) * (x~ @ W_gate + b_gate); the rest is a linear dictionary.

    What an MLP computes is nearly quadratic in places, so a transcoder whose latents are products needs fewer of
    them; and a latent's dependence on any two directions of its input can be read off its weights. W_gate starts
    at zero with b_gate at one: as the linear dictionary.
    """

    linear_encoder: ClassVar[bool] = False
    latent_axis: ClassVar = {**Linear.latent_axis, "W_gate": -1, "b_gate": 0}
    fresh: ClassVar = {"W_gate": 0.0, "b_gate": 1.0}

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        axes = self._axes(self.reads, self.d_in)
        self.W_gate = nn.Parameter(torch.zeros(self.n_latents, *axes).movedim(0, -1))  # [d_in, n_latents]
        self.b_gate = nn.Parameter(torch.ones(self.n_latents))

    def pre_activations(self, x: Tensor) -> Tensor:
        flat = self.normalise(x)
        return (flat @ self.flat_W_enc + self.b_enc) * (flat @ self.W_gate.flatten(0, -2) + self.b_gate)

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        return SparseLatents.from_dense(self.encode(x).reshape(-1, self.n_latents))

    def encode_step(self, x: Float[Tensor, "batch reads"]) -> Encoded:
        gates = F.linear(x, self.W_gate.flatten(0, -2).T, self.b_gate)
        return self.sparsifier.select(F.linear(x, self.flat_W_enc.T, self.b_enc) * gates)

    def row_pre_acts(
        self, x: Float[Tensor, "batch reads"], rows: LatentRows, latents: Int[Tensor, " n"]
    ) -> Float[Tensor, "batch n"]:
        return super().row_pre_acts(x, rows, latents) * F.linear(x, rows["W_gate"], rows["b_gate"])

    def scale_reads_(self, factor: Tensor) -> None:
        super().scale_reads_(factor)
        self.W_gate.mul_(factor.unsqueeze(-1))

    @classmethod
    def tiny(cls) -> Bilinear:
        tiny = cls(d_in=6, d_out=6, n_latents=16, sparsifier=TopK(k=4))
        tiny.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
        torch.nn.init.normal_(tiny.W_gate, generator=torch.Generator().manual_seed(1))
        return tiny

"""TopK: keep the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.kernels import encode_top_k
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.types import DictlearnError, SparseLatents


class TopK(Sparsifier):
    """ReLU of the `k` largest pre-activations of each token; the other latents are zero."""

    compact: ClassVar[bool] = True

    def __init__(self, k: int) -> None:
        super().__init__()
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise DictlearnError(f"sparsifier.k must be a whole number, at least 1, got {k!r}.")
        self.k = k

    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        values, indices = pre_acts.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre_acts).scatter(-1, indices, values.relu())

    def encode_sparse(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> SparseLatents:
        return encode_top_k(x, W_enc, b_enc, self.k)

    def check(self, n_latents: int) -> None:
        if self.k > n_latents:
            raise DictlearnError(f"sparsifier.k must be at most n_latents = {n_latents}, got {self.k}.")

    def config(self) -> dict[str, Any]:
        return {"k": self.k}

    @classmethod
    def tiny(cls) -> TopK:
        return cls(k=4)

"""Absolute TopK: the k pre-activations of largest absolute value, signs kept (AbsTopK, arXiv 2510.00404)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.kernels import encode_abs_top_k, top_columns
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.sparsifiers.top_k import in_rows
from dictlearn.types import DictlearnError, Encoded, SparseLatents


class AbsTopK(Sparsifier):
    """The `k` pre-activations of each token with the largest absolute values; a latent has two directions."""

    compact: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def __init__(self, k: int) -> None:
        super().__init__()
        check_count("sparsifier.k", k)
        self.k = k

    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        indices = pre_acts.abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(pre_acts).scatter(-1, indices, pre_acts.gather(-1, indices))

    def encode_sparse(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> SparseLatents:
        return encode_abs_top_k(x, W_enc, b_enc, self.k)

    def encode_step(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> Encoded:
        return Encoded(encode_abs_top_k(x, W_enc, b_enc, self.k))

    def select(self, pre_acts: Float[Tensor, "n_tokens n_latents"]) -> Encoded:
        _, indices = top_columns(pre_acts.detach().abs(), self.k)
        return Encoded(in_rows(pre_acts.gather(-1, indices), indices, pre_acts.shape[-1]))

    def widened(self, factor: int) -> AbsTopK:
        return AbsTopK(factor * self.k)

    def bind(self, n_latents: int) -> None:
        if self.k > n_latents:
            raise DictlearnError(f"sparsifier.k must be at most n_latents = {n_latents}, got {self.k}.")

    def config(self) -> dict[str, Any]:
        return {"k": self.k}

    @classmethod
    def tiny(cls) -> AbsTopK:
        return cls(k=4)

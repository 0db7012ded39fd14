"""Group-max: the largest pre-activation of each of k groups of latents (EleutherAI sparsify, `groupmax`)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.kernels import encode_group_max
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.sparsifiers.top_k import in_rows
from dictlearn.types import DictlearnError, Encoded, SparseLatents


class GroupMax(Sparsifier):
    """Latents are cut into `k` groups of neighbours; of each, ReLU of the largest pre-activation stays.

    As many latents per token as TopK with the same `k`, found without a search over all of them; latents of one
    group never fire together.
    """

    compact: ClassVar[bool] = True

    def __init__(self, k: int) -> None:
        super().__init__()
        check_count("sparsifier.k", k)
        self.k = k

    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        groups = pre_acts.unflatten(-1, (self.k, -1))
        values, indices = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, indices, values.relu()).flatten(-2)

    def encode_sparse(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> SparseLatents:
        return encode_group_max(x, W_enc, b_enc, self.k)

    def encode_step(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> Encoded:
        return Encoded(encode_group_max(x, W_enc, b_enc, self.k))

    def select(self, pre_acts: Float[Tensor, "n_tokens n_latents"]) -> Encoded:
        n_latents = pre_acts.shape[-1]
        values, places = pre_acts.unflatten(-1, (self.k, -1)).max(-1)  # [n_tokens, k]
        starts = torch.arange(0, n_latents, n_latents // self.k, device=pre_acts.device)
        return Encoded(in_rows(values.relu(), places + starts, n_latents))

    def bind(self, n_latents: int) -> None:
        if n_latents % self.k:
            raise DictlearnError(f"sparsifier.k must divide n_latents = {n_latents}, got {self.k}.")

    def config(self) -> dict[str, Any]:
        return {"k": self.k}

    @classmethod
    def tiny(cls) -> GroupMax:
        return cls(k=4)

"""TopK: keep the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.kernels import encode_top_k, top_columns
from dictlearn.ramp import RUN, Ramp, check_ramp, ramp_factor
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.types import DictlearnError, Encoded, SparseLatents


class TopK(Sparsifier):
    """ReLU of the `k` largest pre-activations of each token; the other latents are zero.

    With `k_start` training begins with that many and comes down (or up) to `k` linearly over `anneal`, a number of
    steps or the whole `run`: more latents learn while nothing has settled. Inference has `k`.
    """

    compact: ClassVar[bool] = True

    def __init__(self, k: int, k_start: int | None = None, anneal: Ramp = "run") -> None:
        super().__init__()
        check_count("sparsifier.k", k)
        check_count("sparsifier.k_start", k_start, or_null=True)
        check_ramp("sparsifier.anneal", anneal)
        if k_start is not None and anneal is None:
            raise DictlearnError(
                f"sparsifier.k_start={k_start} needs sparsifier.anneal, a number of steps or {RUN}, got None."
            )
        self.k, self.k_start, self.anneal = k, k_start, anneal
        self.k_now = k

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

    def encode_step(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> Encoded:
        return Encoded(encode_top_k(x, W_enc, b_enc, self.k_now))

    def select(self, pre_acts: Float[Tensor, "n_tokens n_latents"]) -> Encoded:
        _, indices = top_columns(pre_acts.detach().clone(), self.k_now)
        return Encoded(in_rows(pre_acts.gather(-1, indices).relu(), indices, pre_acts.shape[-1]))

    def at(self, step: int, n_steps: int) -> None:
        if self.k_start is not None:
            self.k_now = round(self.k_start + (self.k - self.k_start) * ramp_factor(self.anneal, step, n_steps))

    def bind(self, n_latents: int) -> None:
        for name, k in (("k", self.k), ("k_start", self.k_start or 1)):
            if k > n_latents:
                raise DictlearnError(f"sparsifier.{name} must be at most n_latents = {n_latents}, got {k}.")

    def widened(self, factor: int) -> TopK:
        return TopK(factor * self.k)

    def for_inference(self) -> TopK:
        return TopK(self.k)

    def config(self) -> dict[str, Any]:
        annealed = {} if self.k_start is None else {"k_start": self.k_start, "anneal": self.anneal}
        return {"k": self.k, **annealed}

    @classmethod
    def tiny(cls) -> TopK:
        return cls(k=4)


def in_rows(values: Float[Tensor, "n_tokens k"], indices: Tensor, n_latents: int) -> SparseLatents:
    """The sparse code with as many entries for every token."""
    n_tokens, k = values.shape
    offsets = torch.arange(0, n_tokens * k + 1, k, device=values.device)
    return SparseLatents(values.flatten(), indices.flatten(), offsets, n_latents)

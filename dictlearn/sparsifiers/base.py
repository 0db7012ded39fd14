"""The interface of a sparsifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dictlearn.types import Latents, Scalar, SparseLatents, Step


class Sparsifier(nn.Module, ABC):
    """Maps pre-activations to latents.

    `compact`: the number of latents per token is small and fixed from the start, so training never builds the
    dense code. `norm_weighted`: the penalty weighs each latent by its decoder norm, so decoder norms are free.
    """

    compact: ClassVar[bool] = False
    norm_weighted: ClassVar[bool] = False

    @abstractmethod
    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Dense latents."""

    def encode_sparse(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> SparseLatents:
        """The same latents as `forward(x @ W_enc + b_enc)`, compact."""
        return SparseLatents.from_dense(self(x @ W_enc + b_enc))

    def encode_step(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> Latents:
        """What a training step uses: compact where that is cheaper, else dense, under autocast in its type."""
        return self.encode_sparse(x, W_enc, b_enc) if self.compact else self(F.linear(x, W_enc.T, b_enc))

    def penalty(self, step: Step) -> Scalar | None:  # noqa: ARG002
        """The sparsity loss, coefficient included; None where the selection itself is sparse."""
        return None

    def check(self, n_latents: int) -> None:
        """Raise DictlearnError if this sparsifier cannot work on `n_latents` latents."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Sparsifier:
        """A small instance for the contract tests (16 latents)."""

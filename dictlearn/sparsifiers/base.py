"""The interface of a sparsifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.registry import kind_of
from dictlearn.types import Encoded, Scalar, SparseLatents, Step


class Sparsifier(nn.Module, ABC):
    """Maps pre-activations to latents.

    What it learns or remembers has one entry per latent, made by `bind`; a dictionary calls that once.

    `compact`: the number of latents per token is small and fixed from the start, so training never builds the
    dense code. `norm_weighted`: the penalty weighs each latent by its decoder norm, so decoder norms are free.
    `per_token`: in training, what a token gives depends on no other token. `per_latent`: whether a latent fires
    depends on no other latent. `signed`: latents may be negative. `leaves_positive`: a positive pre-activation
    need not fire, so that a latent that never fires can have one to be revived by.
    """

    compact: ClassVar[bool] = False
    per_latent: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    leaves_positive: ClassVar[bool] = True
    norm_weighted: bool = False
    per_token: bool = True

    @property
    def kind(self) -> str:
        """By which the registry knows it."""
        return kind_of(self)

    @abstractmethod
    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Dense latents, as at inference."""

    def encode_sparse(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> SparseLatents:
        """The same latents as `forward(x @ W_enc + b_enc)`, compact."""
        return SparseLatents.from_dense(self(x @ W_enc + b_enc))

    # -- training --

    def encode_step(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> Encoded:
        """What a training step uses: compact where that is cheaper, else dense, under autocast in its type."""
        return self.select(F.linear(x, W_enc.T, b_enc))

    def select(self, pre_acts: Float[Tensor, "n_tokens n_latents"]) -> Encoded:
        """The same from pre-activations that are there already; what the penalty needs of them is kept."""
        return Encoded(self(pre_acts))

    def penalty(self, step: Step) -> Scalar | None:  # noqa: ARG002
        """The sparsity loss, coefficient included; None where the selection itself is sparse."""
        return None

    def widened(self, factor: int) -> Sparsifier | None:  # noqa: ARG002
        """One that keeps `factor` times as many latents of each token; None where that number is not fixed."""
        return None

    def at(self, step: int, n_steps: int) -> None:
        """Called before the training step `step`, from 0, of `n_steps`: schedules move. Before, they are at their
        ends.
        """

    def project_(self) -> None:
        """After every optimiser step: back onto the constraint set."""

    def restart_(self, latents: Int[Tensor, " n"]) -> list[tuple[nn.Parameter, Tensor]]:  # noqa: ARG002
        """What is learnt of `latents` is as at first again. Returns these parameters and the places in each."""
        return []

    # -- life of a dictionary --

    def bind(self, n_latents: int) -> None:
        """Make what has one entry per latent. Raises DictlearnError if it cannot work on `n_latents` latents."""

    def set_unit_(self, unit: float) -> None:
        """Before training: the root mean square of the pre-activations of a random direction of norm 1.

        What is given relative to the scale of activations is a multiple of it.
        """

    def scale_latents_(self, factor: Float[Tensor, " n_latents"]) -> None:
        """Pre-activations are multiplied by the positive `factor` from now on; so shall latents be."""

    def for_inference(self) -> Sparsifier:
        """The sparsifier of the inference dictionary: the same latents as `forward`, nothing of training."""
        return self

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Sparsifier:
        """A small instance for the contract tests (16 latents)."""

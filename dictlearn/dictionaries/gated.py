"""The gated dictionary: which latents fire and how strongly are two questions (Rajamanoharan et al. 2024,
arXiv 2404.16014).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.kernels import decode
from dictlearn.losses.recon import recon_loss
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError, Encoded, Output, Scalar, SparseLatents, Step


class Gated(Linear):
    """latents = 1[gate > 0] * relu(exp(r_mag) * (x~ @ W_enc) + b_mag), with gate = x~ @ W_enc + b_enc.

    The penalty is on relu(gate) alone, so it does not shrink the latents; a further reconstruction from relu(gate),
    through a frozen decoder, makes the gates those of the latents that are needed. One encoder product serves both.

    A gate is a threshold on the magnitude: with a = exp(r_mag) * (x~ @ W_enc) + b_mag, the gate is open where a
    exceeds b_mag - exp(r_mag) * b_enc. So the inference dictionary is a linear one with JumpReLU, exactly.
    The sparsifier is `relu`, which gives the penalty.
    """

    inference_kind: ClassVar[str | None] = "linear"
    latent_axis: ClassVar = {**Linear.latent_axis, "r_mag": 0, "b_mag": 0}
    n_decodes: ClassVar[int] = 2  # in a training step, the second one through a frozen decoder
    fresh: ClassVar = {"r_mag": 0.0, "b_mag": "b_enc"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.sparsifier, ReLU):
            raise DictlearnError(
                "A gated dictionary has sparsifier relu, whose penalty its gates get; got "
                f"{type(self.sparsifier).__name__}."
            )
        self.r_mag = nn.Parameter(torch.zeros(self.n_latents))
        self.b_mag = nn.Parameter(torch.zeros(self.n_latents))

    def encode(self, x: Tensor) -> Tensor:
        return self._latents(self.normalise(x) @ self.flat_W_enc)[0]

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        return SparseLatents.from_dense(self.encode(x).reshape(-1, self.n_latents))

    def forward(self, x: Tensor) -> Output:
        products = self.normalise(x) @ self.flat_W_enc
        latents, gates = self._latents(products)
        return Output(self.decode(latents, x), latents, gates)

    def encode_step(self, x: Float[Tensor, "batch reads"]) -> Encoded:
        return Encoded(*self._latents(F.linear(x, self.flat_W_enc.T)))

    def _latents(self, products: Float[Tensor, "*batch n_latents"]) -> tuple[Tensor, Tensor]:
        """Latents and gates."""
        gates = products + self.b_enc
        return torch.where(gates > 0, (products * self.r_mag.exp() + self.b_mag).relu(), 0.0), gates

    def losses(self, step: Step) -> dict[str, Scalar]:
        assert step.pre_acts is not None
        recon = decode(step.pre_acts.relu(), self.flat_W_dec.detach()) + self.offset(step.x).detach()
        return {"recon": recon_loss(step), "gate": recon_loss(step, step.target - recon)}

    def decoder_norms(self) -> Float[Tensor, " n_latents"]:
        """Constants in the penalty: relu(gate) writes through a frozen decoder, so nothing would hold norms up that
        the penalty pulls down, while r_mag makes up for them.
        """
        return super().decoder_norms().detach()

    def penalty(self, step: Step) -> Scalar | None:
        assert step.pre_acts is not None
        return self.sparsifier.penalty(replace(step, latents=step.pre_acts.relu()))

    @torch.no_grad()
    def initialise_(
        self,
        generator: torch.Generator,
        read_means: Float[Tensor, "n_reads d_in"],
        write_means: Float[Tensor, "n_writes d_out"],
        bases: Mapping[str, Float[Tensor, "d_in r"]] | None = None,
    ) -> None:
        super().initialise_(generator, read_means, write_means, bases)
        self.b_mag.copy_(self.b_enc)

    @torch.no_grad()
    def start_from_(self, other: Dictionary) -> None:
        """Take the weights of `other`, a linear dictionary with JumpReLU or ReLU."""
        linear = self.as_linear()
        linear.sparsifier = JumpReLU.fixed(torch.zeros_like(self.b_enc))
        linear.start_from_(other)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
            if (parameter := getattr(self, name)) is not None:
                parameter.copy_(getattr(linear, name))
        self.b_mag.copy_(linear.b_enc)
        self.r_mag.zero_()
        self.b_enc.sub_(linear.sparsifier.thresholds)

    def scale_latents_(self, factor: Float[Tensor, " n_latents"]) -> None:
        super().scale_latents_(factor)
        self.b_mag.mul_(factor)

    @torch.no_grad()
    def for_inference(self) -> Dictionary:
        linear = self.as_linear()
        growth = self.r_mag.exp()
        linear.W_enc.mul_(growth)
        linear.b_enc.copy_(self.b_mag)
        linear.sparsifier = JumpReLU.fixed((self.b_mag - growth * self.b_enc).clamp_min(0))
        return linear.for_inference()

    @classmethod
    def tiny(cls) -> Gated:
        tiny = cls(d_in=6, d_out=6, n_latents=16, sparsifier=ReLU(l1=0.1))
        tiny.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
        return tiny

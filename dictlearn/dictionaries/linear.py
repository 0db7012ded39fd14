"""The linear dictionary: a sparse autoencoder or a transcoder, with an optional skip path."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.dictionaries.base import Dictionary
from dictlearn.kernels import decode
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import Encoded, SparseLatents, Step


class Linear(Dictionary):
    """One linear encoder and one linear decoder around a sparsifier (Bricken et al. 2023; Dunefsky et al. 2024)."""

    def pre_activations(self, x: Tensor) -> Tensor:
        return self.products(self.normalise(x)) + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        return self.sparsifier(self.pre_activations(x))

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        flat = self.normalise(x)
        return self.sparsifier.encode_sparse(flat.reshape(-1, flat.shape[-1]), self.flat_W_enc, self.b_enc)

    def encode_step(self, x: Float[Tensor, "batch reads"]) -> Encoded:
        """Latents of a training step, from normalised reads."""
        return self.sparsifier.encode_step(x, self.flat_W_enc, self.b_enc)

    def step(
        self,
        x: Tensor,
        target: Tensor,
        variance: Float[Tensor, " n_writes"],
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Step:
        flat_x, flat_target = self.normalise(x), self.normalise_target(target, x)
        latents, pre_acts = self.encode_step(flat_x)
        recon = self.decode_flat(latents)  # [batch, n_writes * d_out]
        if self.W_skip is not None:
            recon = recon + self._skip(flat_x)
        return Step(self, flat_x, flat_target, recon, latents, variance, dead, pre_acts)

    def recon_with(self, sparsifier: Sparsifier, x: Float[Tensor, "batch reads"]) -> Float[Tensor, "batch writes"]:
        """The reconstruction of a training step with another sparsifier, from normalised reads."""
        latents, _ = sparsifier.encode_step(x, self.flat_W_enc, self.b_enc)
        return decode(latents, self.flat_W_dec) + self.offset(x)

    def offset(self, x: Float[Tensor, "batch reads"]) -> Float[Tensor, "*batch writes"]:
        """What the latents do not write, from normalised reads: the bias and the skip path."""
        bias = self.b_dec.flatten()
        return bias if self.W_skip is None else bias + self._skip(x)

    @torch.no_grad()
    def as_linear(self) -> Linear:
        """A plain linear dictionary with a copy of these weights, scales and sparsifier."""
        with self.b_dec.device:
            made = Linear(sparsifier=copy.deepcopy(self.sparsifier), **Dictionary.config(self))
        made.sparsifier = copy.deepcopy(self.sparsifier)  # binding it has made its thresholds anew
        for name, tensor in [*made.named_parameters(recurse=False), *made.named_buffers(recurse=False)]:
            tensor.copy_(getattr(self, name))
        made.metadata = dict(self.metadata)
        return made

    @classmethod
    def tiny(cls) -> Linear:
        tiny = cls(d_in=6, d_out=6, n_latents=16, sparsifier=TopK(k=4))
        tiny.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
        return tiny

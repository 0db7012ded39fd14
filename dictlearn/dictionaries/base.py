"""What every dictionary shares: sites, parameters, normalisation, decoding and the forward rule.

    x~ = x * read_scale;  pre = x~ @ W_enc + b_enc;  latents = sparsifier(pre)
    recon = (latents @ W_dec + b_dec (+ x~ @ W_skip.T)) / write_scale

Everything public takes and returns raw activations; `step` works in normalised units.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.kernels import decode
from dictlearn.losses.recon import recon_loss
from dictlearn.sparsifiers import Sparsifier
from dictlearn.types import DictlearnError, Latents, Output, Scalar, SparseLatents, Step


class Dictionary(nn.Module, ABC):
    """A sparse dictionary reading activations at `reads` and writing reconstructions at `writes`.

    Args:
        d_in, d_out: widths of one read and one write site.
        n_latents: width of the code.
        sparsifier: pre-activations to latents.
        reads, writes: site names; a sparse autoencoder reads and writes the same site.
        skip: add a linear path from x to the reconstruction (Paulo et al. 2025, arXiv 2501.18823).
        decoder_norm: "unit" projects the rows of W_dec (over all write sites) to norm 1 after every step, "free"
            does not; None chooses "unit" for a sparse autoencoder unless the sparsifier's penalty is weighted by
            decoder norms.
    """

    site_axis: ClassVar[bool] = False  # several read or write sites: activations have a site axis before the width

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_latents: int,
        sparsifier: Sparsifier,
        reads: Sequence[str] = ("x",),
        writes: Sequence[str] = ("x",),
        skip: bool = False,
        decoder_norm: str | None = None,
    ) -> None:
        super().__init__()
        sparsifier.check(n_latents)
        if not self.site_axis and (len(reads), len(writes)) != (1, 1):
            raise DictlearnError(f"{type(self).__name__} has one read and one write site, got {reads}, {writes}.")
        if decoder_norm not in (None, "unit", "free"):
            raise DictlearnError(f"decoder_norm must be unit, free or null, got {decoder_norm!r}.")
        self.d_in, self.d_out, self.n_latents = d_in, d_out, n_latents
        self.reads, self.writes = tuple(reads), tuple(writes)
        self.sparsifier = sparsifier
        own_norm = "unit" if self.is_autoencoder and not sparsifier.norm_weighted else "free"
        self.decoder_norm = decoder_norm or own_norm
        self.metadata: dict[str, Any] = {}
        self.register_buffer("read_scale", torch.ones(len(self.reads)))
        self.register_buffer("write_scale", torch.ones(len(self.writes)))
        read_axes, write_axes = self._axes(self.reads, d_in), self._axes(self.writes, d_out)
        # Stored latent-major ([n_latents, ...] contiguous), so that sparse gradients touch whole rows.
        self.W_enc = nn.Parameter(torch.zeros(n_latents, *read_axes).movedim(0, -1))  # [d_in, n_latents]
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(torch.zeros(n_latents, *write_axes))  # [n_latents, d_out]
        self.b_dec = nn.Parameter(torch.zeros(write_axes))
        self.W_skip = nn.Parameter(torch.zeros(*write_axes, *read_axes)) if skip else None  # [d_out, d_in]

    read_scale: Tensor  # [n_reads]
    write_scale: Tensor  # [n_writes]

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reads and writes the same sites."""
        return self.reads == self.writes

    # -- the public, raw-unit interface -------------------------------------------------------------------------

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_latents"]:
        """Dense latents of raw activations `x` (several read sites: `[*, n_reads, d_in]`)."""

    @abstractmethod
    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseLatents:
        """The same latents, compact, over the flattened batch."""

    def decode(self, latents: Latents, x: Tensor | None = None) -> Tensor:
        """Reconstruction in raw units; with a skip path the raw input `x` is needed as well.

        Dense latents `[*, n_latents]` give `[*, d_out]`, compact ones `[n_tokens, d_out]`; several write sites
        add an axis before `d_out`.
        """
        flat = decode(latents, self.flat_W_dec) + self.b_dec.flatten()
        if self.W_skip is not None:
            if x is None:
                raise DictlearnError("This dictionary has a skip path: decode(latents, x) needs the input x.")
            flat = flat + self._skip(self.normalise(x)).reshape(flat.shape)
        return self.denormalise(flat)

    def forward(self, x: Tensor) -> Output:
        """Latents (dense), reconstruction and pre-activations of raw activations `x`."""
        pre_acts = self.pre_activations(x)
        latents = self.sparsifier(pre_acts)
        return Output(self.decode(latents, x), latents, pre_acts)

    @abstractmethod
    def pre_activations(self, x: Tensor) -> Tensor | None:
        """`[*, n_latents]` before the sparsifier."""

    # -- sites --

    def select_reads(self, acts: Mapping[str, Tensor]) -> Tensor:
        """The input of this dictionary among activations by site: `[*, d_in]` or `[*, n_reads, d_in]`."""
        return self._select(acts, self.reads)

    def select_writes(self, acts: Mapping[str, Tensor]) -> Tensor:
        """The target of this dictionary among activations by site: `[*, d_out]` or `[*, n_writes, d_out]`."""
        return self._select(acts, self.writes)

    def split_writes(self, recon: Tensor) -> dict[str, Tensor]:
        """Reconstruction by write site, each `[*, d_out]`."""
        return dict(zip(self.writes, recon.unbind(-2) if self.site_axis else (recon,), strict=True))

    def _select(self, acts: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        return torch.stack([acts[name] for name in names], dim=-2) if self.site_axis else acts[names[0]]

    def _axes(self, names: Sequence[str], width: int) -> tuple[int, ...]:
        return (len(names), width) if self.site_axis else (width,)

    # -- normalised units, site axes flattened --

    @property
    def flat_W_enc(self) -> Float[Tensor, "reads n_latents"]:
        return self.W_enc.reshape(-1, self.n_latents)

    @property
    def flat_W_dec(self) -> Float[Tensor, "n_latents writes"]:
        return self.W_dec.reshape(self.n_latents, -1)

    def normalise(self, x: Tensor) -> Float[Tensor, "*batch reads"]:
        """Raw reads to normalised, flattened ones."""
        x = x.to(self.W_dec.dtype)
        return (x * self.read_scale.unsqueeze(-1)).flatten(-2) if self.site_axis else x * self.read_scale

    def normalise_target(self, y: Tensor) -> Float[Tensor, "*batch writes"]:
        """Raw targets to normalised, flattened ones."""
        y = y.to(self.W_dec.dtype)
        return (y * self.write_scale.unsqueeze(-1)).flatten(-2) if self.site_axis else y * self.write_scale

    def denormalise(self, flat: Float[Tensor, "*batch writes"]) -> Tensor:
        """Normalised, flattened reconstructions to raw ones."""
        if not self.site_axis:
            return flat / self.write_scale
        return flat.unflatten(-1, (len(self.writes), self.d_out)) / self.write_scale.unsqueeze(-1)

    def _skip(self, flat_x: Tensor) -> Tensor:
        assert self.W_skip is not None
        return flat_x @ self.W_skip.reshape(self.b_dec.numel(), -1).T

    def decoder_norms(self) -> Float[Tensor, " n_latents"]:
        """||W_dec_i||; of several write sites, the sum of the norms."""
        norms = self.W_dec.norm(dim=-1)
        return norms.sum(-1) if self.site_axis else norms

    # -- training --

    @abstractmethod
    def step(
        self,
        x: Tensor,
        target: Tensor,
        variance: Float[Tensor, " n_writes"],
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Step:
        """The training twin of `forward`, compact where the sparsifier is; `variance` in normalised units."""

    def losses(self, step: Step) -> dict[str, Scalar]:
        """The losses this architecture needs, by name."""
        return {"recon": recon_loss(step)}

    @torch.no_grad()
    def project_(self) -> None:
        """After every optimiser step: back onto the constraint set."""
        if self.decoder_norm == "unit":
            self.flat_W_dec.div_(self.flat_W_dec.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Before clipping: drop the part of the decoder gradient that the projection would undo."""
        if self.decoder_norm == "unit" and self.W_dec.grad is not None:
            grad, rows = self.W_dec.grad.view_as(self.flat_W_dec), self.flat_W_dec
            along = (grad * rows).sum(-1, keepdim=True)  # [n_latents, 1]
            grad.addcmul_(along, rows, value=-1)

    @torch.no_grad()
    def initialise_(
        self,
        generator: torch.Generator,
        read_means: Float[Tensor, "n_reads d_in"],
        write_means: Float[Tensor, "n_writes d_out"],
    ) -> None:
        """Random directions, biases from the means of the raw activations; set the scales before.

        An autoencoder starts tied (W_enc = W_dec^T, unit rows), a transcoder with W_dec = 0, so that it starts as
        the mean predictor. In both, latents see the input about its mean and b_dec is the mean target.
        """
        directions = torch.randn(self.n_latents, self.flat_W_enc.shape[0], generator=generator)
        directions /= directions.norm(dim=-1, keepdim=True)
        self.W_enc.copy_(directions.T.reshape(self.W_enc.shape))
        if self.is_autoencoder:
            self.W_dec.copy_(directions.reshape(self.W_dec.shape))
        b_dec = write_means * self.write_scale.unsqueeze(-1)  # [n_writes, d_out]
        self.b_dec.copy_(b_dec.reshape(self.b_dec.shape))
        mean_x = (read_means * self.read_scale.unsqueeze(-1)).flatten()
        self.b_enc.copy_(-mean_x @ self.flat_W_enc)

    # -- export --

    @torch.no_grad()
    def for_inference(self) -> Dictionary:
        """A frozen copy with the scales folded into the weights; the same latents up to a positive factor.

        With one write site, latents then come in raw activation units: the write scale moves from the decoder
        into the encoder, which keeps the selection because every latent moves alike. Where no selection depends on
        decoder norms being comparable (norm-weighted sparsifiers) each row's norm is folded as well.
        """
        folded = copy.deepcopy(self).requires_grad_(False).eval()
        _fold_scales(folded)
        if self.sparsifier.norm_weighted:
            norms = folded.decoder_norms()
            norms = torch.where(norms > 0, norms, 1.0)
            folded.W_dec.div_(norms.reshape(-1, *[1] * (folded.W_dec.ndim - 1)))
            folded.scale_latents_(norms)
        return folded

    def scale_latents_(self, factor: Float[Tensor, " n_latents"]) -> None:
        """Multiply every latent by its positive `factor`; needs a positively homogeneous sparsifier."""
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)

    def config(self) -> dict[str, Any]:
        """Constructor arguments other than the sparsifier, JSON-able."""
        return {
            "d_in": self.d_in,
            "d_out": self.d_out,
            "n_latents": self.n_latents,
            "reads": list(self.reads),
            "writes": list(self.writes),
            "skip": self.W_skip is not None,
            "decoder_norm": self.decoder_norm,
        }

    @classmethod
    @abstractmethod
    def tiny(cls) -> Dictionary:
        """A small instance for the contract tests."""


def _fold_scales(dictionary: Dictionary) -> None:
    """Move `read_scale` and `write_scale` into the weights and set them to one."""
    read, write = dictionary.read_scale.clone(), dictionary.write_scale.clone()
    per_read = read.unsqueeze(-1) if dictionary.site_axis else read
    per_write = write.unsqueeze(-1) if dictionary.site_axis else write
    dictionary.W_enc.mul_(per_read.unsqueeze(-1))
    dictionary.W_dec.div_(per_write)
    dictionary.b_dec.div_(per_write)
    if dictionary.W_skip is not None:
        skip_rows = per_write.reshape(per_write.shape + (1,) * per_read.ndim)
        dictionary.W_skip.mul_(per_read).div_(skip_rows)
    dictionary.read_scale.fill_(1.0)
    dictionary.write_scale.fill_(1.0)
    if len(write) == 1:
        dictionary.W_dec.mul_(write)
        dictionary.scale_latents_((1 / write).expand(dictionary.n_latents))

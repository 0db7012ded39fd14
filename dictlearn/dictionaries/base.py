"""What every dictionary shares: sites, parameters, normalisation, decoding and the forward rule.

    x~ = x * read_scale;  pre = x~ @ W_enc + b_enc;  latents = sparsifier(pre)
    recon = (latents @ W_dec + b_dec (+ x~ @ W_skip.T)) / write_scale

With `input_norm="layer_norm"` x is each token's layer-normed one, and recon is put back with that token's mean and
standard deviation. Everything public takes and returns raw activations; `step` works in normalised units.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.kernels import LayerNormed, decode, layer_norm, normalise_rows_, project_rows_
from dictlearn.losses.recon import recon_loss
from dictlearn.registry import kind_of
from dictlearn.sparsifiers import Sparsifier
from dictlearn.types import DictlearnError, Latents, Output, Scalar, SparseLatents, Step

INPUT_NORMS = ("none", "layer_norm")


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
        input_norm: "none", or "layer_norm": each token by itself, as in SAELens: z = (x - mean) / (std + 1e-5) over
            the width, std unbiased; recon is multiplied by the same std + 1e-5 and shifted by the same mean. It
            depends on the token, so it is never folded into weights. For autoencoders of one site.

    Raises DictlearnError for values outside these, and where `sparsifier` does not fit `n_latents`.
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
        input_norm: str = "none",
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
        self.input_norm = input_norm
        self._check_input_norm()
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

    def _check_input_norm(self) -> None:
        if self.input_norm not in INPUT_NORMS:
            raise DictlearnError(f"input_norm must be one of {', '.join(INPUT_NORMS)}, got {self.input_norm!r}.")
        if self.input_norm == "none":
            return
        if self.site_axis or not self.is_autoencoder:
            raise DictlearnError(
                "input_norm=layer_norm needs an autoencoder of one site, because the reconstruction is put back "
                f"with the mean and standard deviation of the token that was read; this {type(self).__name__} "
                f"reads {', '.join(self.reads)} and writes {', '.join(self.writes)}: use input_norm=none."
            )
        if self.d_in < 2:
            raise DictlearnError(f"input_norm=layer_norm needs activations at least 2 wide, got {self.d_in}.")

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
        """Reconstruction in raw units; with a skip path or a layer norm the raw input `x` is needed as well.

        Dense latents `[*, n_latents]` give `[*, d_out]`, compact ones `[n_tokens, d_out]`; several write sites
        add an axis before `d_out`. Nothing is kept between calls.
        """
        flat = decode(latents, self.flat_W_dec) + self.b_dec.flatten()
        if self.W_skip is not None:
            flat = flat + self._skip(self.normalise(_needed(x, "a skip path"))).reshape(flat.shape)
        return self.denormalise(flat, x)

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
        if self.input_norm == "layer_norm":
            x = layer_norm(x).z
        return (x * self.read_scale.unsqueeze(-1)).flatten(-2) if self.site_axis else x * self.read_scale

    def normalise_target(self, y: Tensor, x: Tensor | None = None) -> Float[Tensor, "*batch writes"]:
        """Raw targets to normalised, flattened ones; with a layer norm, by the mean and std of the reads `x`."""
        y = y.to(self.W_dec.dtype)
        if self.input_norm == "layer_norm":
            _, mean, std = self._layer_norm(x)
            y = (y - mean) / std
        return (y * self.write_scale.unsqueeze(-1)).flatten(-2) if self.site_axis else y * self.write_scale

    def denormalise(self, flat: Float[Tensor, "*batch writes"], x: Tensor | None = None) -> Tensor:
        """Normalised, flattened reconstructions to raw ones; with a layer norm, by the mean and std of `x`."""
        if self.site_axis:
            return flat.unflatten(-1, (len(self.writes), self.d_out)) / self.write_scale.unsqueeze(-1)
        y = flat / self.write_scale
        if self.input_norm == "none":
            return y
        _, mean, std = self._layer_norm(x)
        per_token = (*y.shape[:-1], 1)
        return y * std.reshape(per_token) + mean.reshape(per_token)

    def _layer_norm(self, x: Tensor | None) -> LayerNormed:
        return layer_norm(_needed(x, "a layer norm").to(self.W_dec.dtype))

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
            normalise_rows_(self.flat_W_dec)

    @torch.no_grad()
    def project_gradient_(self) -> Scalar | None:
        """Before clipping: drop the part of the decoder gradient that the projection would undo.

        Returns the squared norm of what is left of W_dec's gradient; None where nothing is dropped.
        """
        if self.decoder_norm == "free" or self.W_dec.grad is None:
            return None
        return project_rows_(self.W_dec.grad.view_as(self.flat_W_dec), self.flat_W_dec).sum()

    @torch.no_grad()
    def initialise_(
        self,
        generator: torch.Generator,
        read_means: Float[Tensor, "n_reads d_in"],
        write_means: Float[Tensor, "n_writes d_out"],
    ) -> None:
        """Random directions, biases from the means of the activations; set the scales before.

        The means are those of what the scales multiply: raw activations, or layer-normed ones.

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

    @torch.no_grad()
    def start_from_(self, other: Dictionary) -> None:
        """Take the weights of `other`: the same function of raw activations, in units of this one's scales.

        Set the scales before. The sparsifier stays this dictionary's own, so `k` may differ. `other` is usually an
        inference dictionary, which `for_inference()` then gives back. Where this one's `decoder_norm` is "unit",
        the norm of each row of W_dec over all write sites moves into the encoder. Rows of unequal norm (`other` was
        "free", or the write sites' scales are in another proportion) then change what a TopK selects.

        Raises DictlearnError where anything but the sparsifier and `decoder_norm` differs, or where a row of W_dec
        that has to be unit is zero.
        """
        mine, theirs = ({"kind": kind_of(d), **d.config()} for d in (self, other))
        if differing := [key for key in mine if key != "decoder_norm" and mine[key] != theirs.get(key)]:
            listed = ", ".join(f"{key} is {theirs.get(key)} there and {mine[key]} here" for key in differing)
            raise DictlearnError(f"A dictionary starts from one of its own kind, sites and widths: {listed}.")
        n_zero = int((other.flat_W_dec.norm(dim=-1) == 0).sum())
        if self.decoder_norm == "unit" and n_zero:
            raise DictlearnError(
                f"decoder_norm=unit cannot start from rows of W_dec that are zero; {n_zero} of {self.n_latents} "
                "are: use decoder_norm=free."
            )
        start = copy.deepcopy(other)
        _fold_scales(start)
        for name, parameter in self.named_parameters(recurse=False):
            parameter.copy_(start.get_parameter(name))
        _unfold_scales(self)
        if self.decoder_norm == "unit":
            self._move_norms_(self.flat_W_dec.norm(dim=-1))

    # -- export --

    @torch.no_grad()
    def for_inference(self) -> Dictionary:
        """A frozen copy with the scales folded into the weights; the same latents up to a positive factor.

        With one write site, latents then come in raw activation units: the write scale moves from the decoder
        into the encoder, which keeps the selection because every latent moves alike. Where no selection depends on
        decoder norms being comparable (norm-weighted sparsifiers) each row's norm is folded as well. A layer norm
        stays, and latents are in units of the token's standard deviation.
        """
        folded = copy.deepcopy(self).requires_grad_(False).eval()
        _fold_scales(folded)
        if self.sparsifier.norm_weighted:
            folded._move_norms_(folded.decoder_norms())
        return folded

    def _move_norms_(self, norms: Float[Tensor, " n_latents"]) -> None:
        """Divide the rows of W_dec by `norms`, multiply the latents by them; rows of norm zero stay."""
        norms = torch.where(norms > 0, norms, 1.0)
        self.W_dec.div_(norms.reshape(-1, *[1] * (self.W_dec.ndim - 1)))
        self.scale_latents_(norms)

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
            "input_norm": self.input_norm,
        }

    @classmethod
    @abstractmethod
    def tiny(cls) -> Dictionary:
        """A small instance for the contract tests."""


def _needed(x: Tensor | None, part: str) -> Tensor:
    if x is None:
        raise DictlearnError(f"This dictionary has {part}: decode(latents, x) needs the input x.")
    return x


def _fold_scales(dictionary: Dictionary) -> None:
    """Move `read_scale` and `write_scale` into the weights and set them to one."""
    read, write = dictionary.read_scale.clone(), dictionary.write_scale.clone()
    _rescale_weights(dictionary, read, 1 / write)
    dictionary.read_scale.fill_(1.0)
    dictionary.write_scale.fill_(1.0)


def _unfold_scales(dictionary: Dictionary) -> None:
    """The inverse: from weights in raw units to weights for the scales that are set."""
    _rescale_weights(dictionary, 1 / dictionary.read_scale, dictionary.write_scale)


def _rescale_weights(
    dictionary: Dictionary, reads: Float[Tensor, " n_reads"], writes: Float[Tensor, " n_writes"]
) -> None:
    """Multiply what the weights read by `reads` and what they write by `writes`.

    With one write site the latents are multiplied as well, and the rows of W_dec keep their norms.
    """
    per_read = reads.unsqueeze(-1) if dictionary.site_axis else reads
    per_write = writes.unsqueeze(-1) if dictionary.site_axis else writes
    dictionary.W_enc.mul_(per_read.unsqueeze(-1))
    dictionary.b_dec.mul_(per_write)
    if dictionary.W_skip is not None:
        dictionary.W_skip.mul_(per_read).mul_(per_write.reshape(per_write.shape + (1,) * per_read.ndim))
    if len(writes) == 1:
        dictionary.scale_latents_(writes.expand(dictionary.n_latents))
    else:
        dictionary.W_dec.mul_(per_write)

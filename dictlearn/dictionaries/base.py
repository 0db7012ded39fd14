"""What every dictionary shares: sites, parameters, normalisation, decoding and the forward rule.

    x~ = x * read_scale;  pre = x~ @ W_enc + b_enc;  latents = sparsifier(pre)
    recon = (latents @ W_dec + b_dec (+ x~ @ W_skip.T)) / write_scale

With an `input_norm` x is each token's normed one, and an autoencoder's recon is put back with what was taken off
that token. Everything public takes and returns raw activations; `step` works in normalised units.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.checks import check_flag
from dictlearn.dictionaries import _latents, _scales
from dictlearn.dictionaries._input_norm import Normed, check_input_norm, normed, undone
from dictlearn.dictionaries._sites import Sited
from dictlearn.kernels import decode, normalise_rows_, project_rows_
from dictlearn.losses.recon import recon_loss
from dictlearn.sparsifiers import Sparsifier
from dictlearn.types import DictlearnError, LatentRows, Latents, Output, Scalar, SparseLatents, Step


class Dictionary(Sited, nn.Module, ABC):
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
        input_norm: "none", or how each token is normalised by itself (_input_norm.py). For autoencoders of one site
            "layer_norm", as in SAELens: z = (x - mean) / (std + 1e-5) over the width, std unbiased, recon is
            multiplied by std and shifted by the mean; "constant_norm_rescale": to norm sqrt(d_in); "centre": the
            mean over the width is taken off. For transcoders "rms_norm" and "lm_layer_norm": the language model's
            norm without its gain and bias, of what is read alone.

    Raises DictlearnError for values outside these, and where `sparsifier` does not fit `n_latents`.
    """

    linear_encoder: ClassVar[bool] = True  # pre-activations are x~ @ W_enc + b_enc
    latent_axis: ClassVar[Mapping[str, int]] = {"W_enc": -1, "b_enc": 0, "W_dec": 0}  # one entry a latent
    fresh: ClassVar[Mapping[str, float | str]] = {}  # a latent's other weights at its start: a value or a weight
    layered: ClassVar[bool] = False  # each read has latents of its own, for the write at its place and later ones
    nested: ClassVar[bool] = False  # the loss `recon` is not that of the reconstruction alone
    inference_kind: ClassVar[str | None] = None  # of `for_inference()`, where it is another

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
        sparsifier.bind(n_latents)
        if not self.site_axis and (len(reads), len(writes)) != (1, 1):
            raise DictlearnError(f"{type(self).__name__} has one read and one write site, got {reads}, {writes}.")
        if decoder_norm not in (None, "unit", "free"):
            raise DictlearnError(f"decoder_norm must be unit, free or null, got {decoder_norm!r}.")
        check_flag("skip", skip)
        self.d_in, self.d_out, self.n_latents = d_in, d_out, n_latents
        self.reads, self.writes = tuple(reads), tuple(writes)
        self.sparsifier = sparsifier
        self.input_norm = input_norm
        check_input_norm(self)
        own_norm = "unit" if self.is_autoencoder and not sparsifier.norm_weighted else "free"
        self.decoder_norm = decoder_norm or own_norm
        self.metadata: dict[str, Any] = {}
        self.register_buffer("read_scale", torch.ones(len(self.reads)))
        self.register_buffer("write_scale", torch.ones(len(self.writes)))
        self._make_weights(skip)

    read_scale: Tensor  # [n_reads]
    write_scale: Tensor  # [n_writes]

    def _make_weights(self, skip: bool) -> None:
        read_axes, write_axes = self._axes(self.reads, self.d_in), self._axes(self.writes, self.d_out)
        # Stored latent-major ([n_latents, ...] contiguous), so that sparse gradients touch whole rows.
        self.W_enc = nn.Parameter(torch.zeros(self.n_latents, *read_axes).movedim(0, -1))  # [d_in, n_latents]
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        self.W_dec = nn.Parameter(torch.zeros(self.n_latents, *write_axes))  # [n_latents, d_out]
        self.b_dec = nn.Parameter(torch.zeros(write_axes))
        self.W_skip = nn.Parameter(torch.zeros(*write_axes, *read_axes)) if skip else None  # [d_out, d_in]

    # -- the public, raw-unit interface -------------------------------------------------------------------------

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_latents"]:
        """Dense latents of raw activations `x` (several read sites: `[*, n_reads, d_in]`)."""

    @abstractmethod
    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseLatents:
        """The same latents, compact, over the flattened batch."""

    def decode(self, latents: Latents, x: Tensor | None = None) -> Tensor:
        """Reconstruction in raw units; with a skip path or an input norm the raw input `x` is needed as well.

        Dense latents `[*, n_latents]` give `[*, d_out]`, compact ones `[n_tokens, d_out]`; several write sites
        add an axis before `d_out`. Nothing is kept between calls.
        """
        flat = self.decode_flat(latents)
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

    # -- normalised units, site axes flattened --

    @property
    def flat_W_enc(self) -> Float[Tensor, "reads n_latents"]:
        return self.W_enc.reshape(-1, self.n_latents)

    @property
    def flat_W_dec(self) -> Float[Tensor, "n_latents writes"]:
        return self.W_dec.reshape(self.n_latents, -1)

    @property
    def decoders(self) -> list[nn.Parameter]:
        """The decoder's weights: rows of successive latents; with a site axis, for the last of the write sites."""
        return [self.W_dec]

    def products(self, x: Float[Tensor, "*batch reads"]) -> Float[Tensor, "*batch n_latents"]:
        """x~ @ W_enc of normalised reads."""
        return x @ self.flat_W_enc

    def decode_flat(self, latents: Latents) -> Float[Tensor, "*batch writes"]:
        """latents @ W_dec + b_dec."""
        return decode(latents, self.flat_W_dec) + self.b_dec.flatten()

    def normalise(self, x: Tensor) -> Float[Tensor, "*batch reads"]:
        """Raw reads to normalised, flattened ones."""
        x = x.to(self.b_dec.dtype) if self.input_norm == "none" else self._normed(x).z
        return (x * self.read_scale.unsqueeze(-1)).flatten(-2) if self.site_axis else x * self.read_scale

    def normalise_target(self, y: Tensor, x: Tensor | None = None) -> Float[Tensor, "*batch writes"]:
        """Raw targets to normalised, flattened ones; an autoencoder's by what its input norm takes off `x`."""
        y = y.to(self.b_dec.dtype)
        if undone(self.input_norm):
            norm = self._normed(x)
            y = (y - norm.shift) / norm.divisor
        return (y * self.write_scale.unsqueeze(-1)).flatten(-2) if self.site_axis else y * self.write_scale

    def denormalise(self, flat: Float[Tensor, "*batch writes"], x: Tensor | None = None) -> Tensor:
        """Normalised, flattened reconstructions to raw ones; an autoencoder's by what was taken off `x`."""
        if self.site_axis:
            return flat.unflatten(-1, (len(self.writes), self.d_out)) / self.write_scale.unsqueeze(-1)
        y = flat / self.write_scale
        if not undone(self.input_norm):
            return y
        norm, per_token = self._normed(x), (*y.shape[:-1], 1)
        return y * norm.factor.reshape(per_token) + norm.shift.reshape(per_token)

    def _normed(self, x: Tensor | None) -> Normed:
        return normed(self.input_norm, _needed(x, f"input_norm={self.input_norm}").to(self.b_dec.dtype))

    def _skip(self, flat_x: Tensor) -> Tensor:
        assert self.W_skip is not None
        return flat_x @ self.W_skip.reshape(self.b_dec.numel(), -1).T

    def decoder_norms(self) -> Float[Tensor, " n_latents"]:
        """||W_dec_i||; of several write sites, the sum of the norms."""
        norms = self.W_dec.norm(dim=-1)
        return norms.sum(-1) if self.site_axis else norms

    def penalty_norms(self) -> Float[Tensor, " n_latents"]:
        """By which a penalty weighs the latents: ||W_dec_i||; of several write sites the mean of the norms, as the
        reconstruction loss is a mean over these, so that coefficients mean the same at every number of them.
        """
        return self.decoder_norms() / len(self.writes)

    # -- latents one by one --

    def parts_of(self, latents: Int[Tensor, " n"]) -> list[_latents.Part]:
        """Where the weights of some latents are."""
        return [_latents.Part(name, axis, latents) for name, axis in self.latent_axis.items()]

    def latent_rows(self, latents: Int[Tensor, " n"]) -> LatentRows:
        """The weights of some latents, in normalised units."""
        return _latents.rows(self, latents)

    def row_pre_acts(self, x: Tensor, rows: LatentRows, latents: Int[Tensor, " n"]) -> Float[Tensor, "batch n"]:  # noqa: ARG002
        """The pre-activations of `latents`, whose weights are `rows`, from normalised reads."""
        return F.linear(x, rows["W_enc"], rows["b_enc"])

    def decode_rows(self, code: Latents, rows: LatentRows, latents: Int[Tensor, " n"]) -> Tensor:  # noqa: ARG002
        """What `latents`, whose weights are `rows`, write with the values `code` [batch, n]; without a bias."""
        return decode(code, rows["W_dec"])

    def add_row_gradients_(self, latents: Int[Tensor, " n"], rows: LatentRows) -> None:
        """Add the gradients of `rows` to those of the weights they are copies of."""
        _latents.add_gradients_(self, latents, rows)

    # -- training --

    def at(self, step: int, n_steps: int) -> None:
        """Called before the training step `step`, from 0, of `n_steps`: schedules move."""
        self.sparsifier.at(step, n_steps)

    def set_unit_(self, units: Float[Tensor, " n_reads"]) -> None:
        """Before training, scales being set: see `Sparsifier.set_unit_`; a direction of norm 1 at each read."""
        self.sparsifier.set_unit_(float(units.square().mean().sqrt()))

    @property
    def per_token(self) -> bool:
        """Whether, in training, what a token gives depends on no other token of the batch."""
        return self.sparsifier.per_token

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

    def penalty(self, step: Step) -> Scalar | None:
        """The sparsity loss, coefficient included."""
        return self.sparsifier.penalty(step)

    @torch.no_grad()
    def project_(self) -> None:
        """After every optimiser step: back onto the constraint set."""
        self.sparsifier.project_()
        if self.decoder_norm == "unit":
            for rows in self.decoders:
                normalise_rows_(rows.view(len(rows), -1))

    @torch.no_grad()
    def project_gradient_(self) -> Scalar | None:
        """Before clipping: drop the part of the decoder gradient that the projection would undo.

        Returns the squared norm of what is left of the decoder's gradient; None where nothing is dropped.
        """
        pairs = [(rows.grad, rows) for rows in self.decoders if rows.grad is not None]
        if self.decoder_norm == "free" or not pairs:
            return None
        return torch.stack([project_rows_(g.view(len(w), -1), w.view(len(w), -1)).sum() for g, w in pairs]).sum()

    @torch.no_grad()
    def initialise_(
        self,
        generator: torch.Generator,
        read_means: Float[Tensor, "n_reads d_in"],
        write_means: Float[Tensor, "n_writes d_out"],
        bases: Mapping[str, Float[Tensor, "d_in r"]] | None = None,
    ) -> None:
        """Random directions, biases from the means of the activations; set the scales before.

        The means are those of what the scales multiply: raw activations, or layer-normed ones. At the read sites in
        `bases`, the directions are drawn in the subspaces that these span (orthonormal columns).

        An autoencoder starts tied (W_enc = W_dec^T, unit rows), a transcoder with W_dec = 0, as the mean predictor,
        or with random unit rows where they have to be unit. In both, latents see the input about its mean and b_dec
        is the mean target.
        """
        directions = self._directions(generator, bases or {})
        self.W_enc.copy_(directions.T.reshape(self.W_enc.shape))
        if self.is_autoencoder:
            self.W_dec.copy_(directions.reshape(self.W_dec.shape))
        elif self.decoder_norm == "unit":
            _latents.draw_unit_rows_(self.decoders, generator)
        b_dec = write_means * self.write_scale.unsqueeze(-1)  # [n_writes, d_out]
        self.b_dec.copy_(b_dec.reshape(self.b_dec.shape))
        mean_x = (read_means * self.read_scale.unsqueeze(-1)).flatten()
        self.b_enc.copy_(-self.products(mean_x))

    def _directions(
        self, generator: torch.Generator, bases: Mapping[str, Tensor]
    ) -> Float[Tensor, "n_latents width"]:
        """Random and of norm 1, one for each latent, in the width that it reads."""
        return _latents.random_directions(self.n_latents, self.reads, self.d_in, generator, bases)

    def start_from_(self, other: Dictionary) -> None:
        """Take the weights of `other`: the same function of raw activations, in units of this one's scales.

        Set the scales before. The sparsifier stays this dictionary's own, so `k` may differ; what it learns is
        taken where `other` has it. `other` is usually an inference dictionary, which `for_inference()` then gives
        back. Where this one's `decoder_norm` is "unit", the norm of each row of W_dec over all write sites moves
        into the encoder. Rows of unequal norm (`other` was "free", or the write sites' scales are in another
        proportion) then change what a TopK selects.

        Raises DictlearnError where anything but the sparsifier and `decoder_norm` differs, or where a row of W_dec
        that has to be unit is zero.
        """
        _scales.start_from_(self, other)

    # -- export --

    @torch.no_grad()
    def for_inference(self) -> Dictionary:
        """A frozen copy with the scales folded into the weights; the same latents up to a positive factor.

        With one write site, latents then come in raw activation units: the write scale moves from the decoder
        into the encoder, which keeps the selection because every latent moves alike. Where no latent's firing
        depends on another one (ReLU, JumpReLU) each row's norm is folded as well. An input norm stays, and latents
        are in its units.
        """
        folded = copy.deepcopy(self).requires_grad_(False).eval()
        folded.sparsifier = folded.sparsifier.for_inference().requires_grad_(False).eval()
        _scales.fold(folded)
        if folded.sparsifier.per_latent:
            folded.move_norms_(folded.decoder_norms())
        return folded

    def move_norms_(self, norms: Float[Tensor, " n_latents"]) -> None:
        """Divide the rows of W_dec by `norms`, multiply the latents by them; rows of norm zero stay."""
        norms = torch.where(norms > 0, norms, 1.0)
        for rows, own in zip(self.decoders, norms.split([len(rows) for rows in self.decoders]), strict=True):
            rows.div_(own.reshape(-1, *[1] * (rows.ndim - 1)))
        self.scale_latents_(norms)

    def scale_latents_(self, factor: Float[Tensor, " n_latents"]) -> None:
        """Multiply every latent by its positive `factor`."""
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)
        self.sparsifier.scale_latents_(factor)

    def scale_reads_(self, factor: Float[Tensor, "*reads_and_width"]) -> None:
        """Multiply what is read by `factor`, [n_reads, 1] where there is a site axis, else [1]."""
        self.W_enc.mul_(factor.unsqueeze(-1))
        if self.W_skip is not None:
            self.W_skip.mul_(factor)

    def scale_writes_(self, factor: Float[Tensor, "*writes_and_width"]) -> None:
        """Multiply by `factor` what is written beside the latents: bias and skip path."""
        self.b_dec.mul_(factor)
        if self.W_skip is not None:
            self.W_skip.mul_(factor.reshape(factor.shape + (1,) * (self.W_skip.ndim - self.b_dec.ndim)))

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

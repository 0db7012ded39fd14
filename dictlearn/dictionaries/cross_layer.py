"""The cross-layer transcoder: latents of one layer write to it and to every later one (Ameisen et al. 2025,
"Circuit Tracing").
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.dictionaries._latents import Part, random_directions
from dictlearn.dictionaries.base import Dictionary
from dictlearn.kernels import decode
from dictlearn.sparsifiers._per_layer import LayeredStep, PerLayer, apart, side_by_side
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, Encoded, LatentRows, Latents, SparseLatents, Step


class CrossLayer(Dictionary):
    """L layers, read and written at one site each, of equal numbers of latents.

        latents_l = sparsifier_l(x~_l @ W_enc_l + b_enc_l)
        recon_m = (sum over l <= m of latents_l @ W_dec_l[:, m - l] + b_dec_m (+ x~_m @ W_skip_m.T)) / write_scale_m

    `W_enc` [d_in, n_latents] and `b_enc` are those of all layers side by side, `W_dec_l` is
    [n_latents / L, L - l, d_out], `W_skip` [L, d_out, d_in]. Each layer has a sparsifier of its own, like the one
    given: `k` and `target_l0` are those of each layer, and the penalty is the mean over layers, as the
    reconstruction loss is the mean over their targets. The norm of a latent's decoder is that of its rows at all
    write sites together, as in the paper.

    Args:
        reads, writes: of the layers in the order in which the model runs, such as mlp_in.0 ... and mlp_out.0 ...
        others: those of `Dictionary`; `n_latents` is that of all layers.
    """

    site_axis: ClassVar[bool] = True
    linear_encoder: ClassVar[bool] = False
    latent_axis: ClassVar = {"W_enc": -1, "b_enc": 0}
    layered: ClassVar[bool] = True

    sparsifier: PerLayer

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_latents: int,
        sparsifier: Sparsifier,
        reads: Sequence[str],
        writes: Sequence[str],
        skip: bool = False,
        decoder_norm: str | None = None,
        input_norm: str = "none",
    ) -> None:
        if not 0 < len(reads) == len(writes) or tuple(reads) == tuple(writes):
            raise DictlearnError(
                "A cross-layer transcoder reads one site of every layer and writes another one, got reads "
                f"{', '.join(reads)} and writes {', '.join(writes)}."
            )
        self.n_layers, self.n_per_layer = len(reads), n_latents // len(reads)
        layers = PerLayer(copy.deepcopy(sparsifier) for _ in reads)
        super().__init__(d_in, d_out, n_latents, layers, reads, writes, skip, decoder_norm, input_norm)
        self._found: tuple[Tensor, list[_OfLayer]] | None = None

    def _make_weights(self, skip: bool) -> None:
        n_layers, d_in, d_out = self.n_layers, self.d_in, self.d_out
        self.W_enc = nn.Parameter(torch.zeros(self.n_latents, d_in).T)  # stored latent-major
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        for i in range(n_layers):
            rows = nn.Parameter(torch.zeros(self.n_per_layer, n_layers - i, d_out))
            self.register_parameter(f"W_dec_{i}", rows)
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_out))
        self.W_skip = nn.Parameter(torch.zeros(n_layers, d_out, d_in)) if skip else None

    @property
    def decoders(self) -> list[nn.Parameter]:
        return [self.get_parameter(f"W_dec_{i}") for i in range(self.n_layers)]

    @property
    def W_dec(self) -> Float[Tensor, "n_latents n_layers d_out"]:  # type: ignore[override]
        """A copy of the decoders in one tensor, zero where nothing is written."""
        return torch.cat([F.pad(rows, (0, 0, i, 0)) for i, rows in enumerate(self.decoders)])

    # -- encode and decode --

    def products(self, x: Float[Tensor, "*batch reads"]) -> Float[Tensor, "*batch n_latents"]:
        return torch.cat([part @ W_enc for part, W_enc, _ in self._encoders(x)], dim=-1)

    def _encoders(self, x: Float[Tensor, "*batch reads"]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer what it reads, its W_enc [d_in, n_per_layer] and its b_enc."""
        parts = x.unflatten(-1, (self.n_layers, self.d_in)).unbind(-2)
        weights = [rows.T for rows in self.W_enc.T.split(self.n_per_layer)]
        return list(zip(parts, weights, self.b_enc.split(self.n_per_layer), strict=True))

    def pre_activations(self, x: Tensor) -> Tensor:
        return self.products(self.normalise(x)) + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        return self.sparsifier(self.pre_activations(x))

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        encoders = self._encoders(self.normalise(x).reshape(-1, self.n_layers * self.d_in))
        codes = [layer.encode_sparse(*own) for layer, own in zip(self.sparsifier.layers, encoders, strict=True)]
        joined = side_by_side(codes)
        assert isinstance(joined, SparseLatents)
        return joined

    def decode_flat(self, latents: Latents) -> Float[Tensor, "*batch writes"]:
        return self._written(apart(latents, self.n_layers))

    def _written(self, codes: Sequence[Latents]) -> Float[Tensor, "*batch writes"]:
        """What the codes of the layers write, and the bias. One decode for each layer, to all its targets: the
        gradients of these are summed up at the code, before the encoder has its one backward pass.
        """
        decoded = [decode(code, rows.flatten(1)) for code, rows in zip(codes, self.decoders, strict=True)]
        pieces = [part.split(self.d_out, dim=-1) for part in decoded]  # by layer, then by target from there on
        targets = [
            sum((pieces[i][target - i] for i in range(target + 1)), start=bias)
            for target, bias in enumerate(self.b_dec)
        ]
        return torch.cat(targets, dim=-1)

    def _skip(self, flat_x: Tensor) -> Tensor:
        assert self.W_skip is not None
        x = flat_x.unflatten(-1, (self.n_layers, self.d_in))
        return torch.einsum("...li,loi->...lo", x, self.W_skip).flatten(-2)

    def step(
        self,
        x: Tensor,
        target: Tensor,
        variance: Float[Tensor, " n_writes"],
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Step:
        flat_x, flat_target = self.normalise(x), self.normalise_target(target)
        encoded = self._encode_step(self.sparsifier, flat_x)
        codes, pre_acts = [e.latents for e in encoded], [e.pre_acts for e in encoded if e.pre_acts is not None]
        return LayeredStep(
            self,
            flat_x,
            flat_target,
            self._reconstructed(codes, flat_x),
            side_by_side(codes),
            variance,
            dead,
            torch.cat(pre_acts, dim=-1) if pre_acts else None,
            encoded=encoded,
            dead_in=None if dead is None else tuple(own.latents for own in self._by_layer(dead)),
        )

    def _encode_step(self, sparsifier: PerLayer, x: Float[Tensor, "batch reads"]) -> tuple[Encoded, ...]:
        encoders = zip(sparsifier.layers, self._encoders(x), strict=True)
        return tuple(layer.encode_step(*own) for layer, own in encoders)

    def _reconstructed(self, codes: Sequence[Latents], x: Float[Tensor, "batch reads"]) -> Tensor:
        recon = self._written(codes)
        return recon if self.W_skip is None else recon + self._skip(x)

    def recon_with(self, sparsifier: Sparsifier, x: Float[Tensor, "batch reads"]) -> Float[Tensor, "batch writes"]:
        """The reconstruction of a training step with another sparsifier, from normalised reads."""
        assert isinstance(sparsifier, PerLayer)
        return self._reconstructed([e.latents for e in self._encode_step(sparsifier, x)], x)

    def decoder_norms(self) -> Float[Tensor, " n_latents"]:
        return torch.cat([rows.flatten(1).norm(dim=-1) for rows in self.decoders])

    def penalty_norms(self) -> Float[Tensor, " n_latents"]:
        """Those of the decoders; it is the penalties of the layers of which the mean is taken."""
        return self.decoder_norms()

    # -- latents one by one --

    def _by_layer(self, latents: Int[Tensor, " n"]) -> list[_OfLayer]:
        """Found once for the same tensor, because it waits for the device."""
        if self._found is None or self._found[0] is not latents:
            layer = latents // self.n_per_layer
            order = layer.argsort(stable=True)
            counts = layer.bincount(minlength=self.n_layers).tolist()
            found = [
                _OfLayer(places, latents[places] - i * self.n_per_layer)
                for i, places in enumerate(order.split(counts))
            ]
            self._found = latents, found
        return self._found[1]

    def parts_of(self, latents: Int[Tensor, " n"]) -> list[Part]:
        decoders = [Part(f"W_dec_{i}", 0, own.latents) for i, own in enumerate(self._by_layer(latents))]
        return super().parts_of(latents) + decoders

    def row_pre_acts(self, x: Tensor, rows: LatentRows, latents: Int[Tensor, " n"]) -> Float[Tensor, "batch n"]:
        places = [own.places for own in self._by_layer(latents)]
        parts = x.unflatten(-1, (self.n_layers, self.d_in)).unbind(-2)
        by_layer = [
            F.linear(x, rows["W_enc"][own], rows["b_enc"][own]) for x, own in zip(parts, places, strict=True)
        ]
        return torch.cat(by_layer, dim=-1).index_select(-1, torch.cat(places).argsort())

    def decode_rows(self, code: Latents, rows: LatentRows, latents: Int[Tensor, " n"]) -> Tensor:
        assert isinstance(code, Tensor)
        written = [
            F.pad(code[:, own.places] @ rows[f"W_dec_{i}"], (i * self.d_out, 0))
            for i, own in enumerate(self._by_layer(latents))
        ]
        return torch.stack(written).sum(0)

    # -- start and scales --

    def set_unit_(self, units: Float[Tensor, " n_reads"]) -> None:
        self.sparsifier.set_units_(units)

    def _directions(
        self, generator: torch.Generator, bases: Mapping[str, Tensor]
    ) -> Float[Tensor, "n_latents d_in"]:
        found = [random_directions(self.n_per_layer, [site], self.d_in, generator, bases) for site in self.reads]
        return torch.cat(found)

    def scale_reads_(self, factor: Float[Tensor, "n_layers 1"]) -> None:
        self.W_enc.mul_(factor.squeeze(-1).repeat_interleave(self.n_per_layer))
        if self.W_skip is not None:
            self.W_skip.mul_(factor.unsqueeze(-1))

    @classmethod
    def tiny(cls) -> CrossLayer:
        tiny = cls(6, 5, 16, TopK(k=4), reads=("a.in", "b.in"), writes=("a.out", "b.out"))
        generator = torch.Generator().manual_seed(0)
        tiny.initialise_(generator, torch.zeros(2, 6), torch.zeros(2, 5))
        for rows in tiny.decoders:  # as if it had learnt: they start at zero
            nn.init.normal_(rows, generator=generator)
        return tiny


class _OfLayer(NamedTuple):
    """Those of some latents that are of one layer: their places among all, and what they are there."""

    places: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]

"""The layers of a model with transcoders: what each reads and writes, as linear maps of a prompt's frozen norms."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.circuits.cuts import Cut
from dictlearn.circuits.dictionary_maps import decoder_rows, encoder_columns, skipped, token_norm, written_bias
from dictlearn.circuits.parts import STREAM, layer_at, n_layers, widened
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import resolve
from dictlearn.types import DictlearnError, Site


class Layer:
    """One layer's MLP, and the transcoder that stands for it, if there is one.

    `cut` and `place`: the dictionary, and the place of the layer among its read and write sites.
    """

    def __init__(self, write: Site, cut: Cut | None = None, place: int = 0) -> None:
        self.write, self.cut, self.place = write, cut, place
        self.read = None if cut is None else cut.reads[place]

    @property
    def dictionary(self) -> Dictionary:
        assert self.cut is not None
        return self.cut.dictionary

    def hold(self, x: Float[Tensor, "rows ctx d_in"]) -> None:
        """Keep the denominators of the dictionary's input norm on what it reads from a prompt."""
        self._divisor = token_norm(self.dictionary, x).divisor[0]

    def skip(self, x: Float[Tensor, "rows ctx d_in"]) -> Float[Tensor, "rows ctx d_out"] | None:
        """What the skip path writes; linear in `x`."""
        if self.cut is None:
            return None
        return skipped(self.dictionary, x, self._divisor[: x.shape[-2]], self.place, self.place)

    def vectors(
        self, latents: Int[Tensor, " n"], positions: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        """Pre-activations of some latents at positions, as directions in what is read, and constants."""
        columns = encoder_columns(self.dictionary, latents, self.place)
        return columns / self._divisor[positions], widened(self.dictionary.b_enc.detach()[latents])

    def decoder_rows(self, latents: Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
        """What some latents of the dictionary write here at a value of 1."""
        return decoder_rows(self.dictionary, latents, self.place)

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """What the dictionary writes here at every token, without latents and skip path."""
        return None if self.cut is None else written_bias(self.dictionary, self.place)


def layers_of(model: PreTrainedModel, cuts: Sequence[Cut]) -> list[Layer]:
    """Every layer of the model.

    Raises DictlearnError for a dictionary that is no transcoder of an MLP: that writes anything but mlp_out.L, or
    reads what it writes, or something else than the stream before that MLP, or whose pre-activations are not linear
    in what it reads.
    """
    found = [Layer(resolve(model, f"mlp_out.{layer}")) for layer in range(n_layers(model))]
    for cut in cuts:
        d = cut.dictionary
        if d.is_autoencoder or not (d.layered or (d.linear_encoder and not d.site_axis)):
            raise DictlearnError(
                "Attribution graphs are of transcoders with linear encoders, and of cross-layer transcoders: "
                f"{cut.name} is a {type(d).__name__} that reads {', '.join(d.reads)} and writes "
                f"{', '.join(d.writes)}."
            )
        for place, (read, site) in enumerate(zip(cut.reads, cut.writes, strict=True)):
            written = layer_at(model, site, ("mlp_out",))
            if written is None:
                raise DictlearnError(
                    f"Attribution graphs are of dictionaries that write mlp_out.0 to mlp_out.{len(found) - 1}: "
                    f"{cut.name} writes {site.name}."
                )
            number, _ = written
            before = [(number, "mlp_in"), (number, "resid_mid"), (number, "resid_pre"), (number - 1, "resid_post")]
            if layer_at(model, read, STREAM) not in before:
                raise DictlearnError(
                    "Attribution graphs are of dictionaries that read the stream before the MLP of a layer "
                    f"(mlp_in.{number}, resid_mid.{number} or resid_pre.{number}) and write what the MLP writes: "
                    f"{cut.name} reads {read.name} and writes {site.name}."
                )
            found[number] = Layer(site, cut, place)
    return found

"""Shared types: axis aliases, sites, sparse latents and what a dictionary returns.

Axis names (glossary): `n_tokens` or `batch` rows of activations, `d_in` / `d_out` widths of the read and the
write site, `n_latents` the width of the code, `nnz` the number of stored latents of a whole batch.
A dictionary of several sites has one more axis before the width: `[*, n_reads, d_in]`, `[*, n_writes, d_out]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary
    from dictlearn.lm.clean_run import CleanRun

Scalar: TypeAlias = Float[Tensor, ""]
Acts: TypeAlias = Float[Tensor, "*batch d"]  # activations; several sites: [*, n_sites, d]
DenseLatents: TypeAlias = Float[Tensor, "*batch n_latents"]
TokenIds: TypeAlias = Int[Tensor, "rows ctx"]
TokenMask: TypeAlias = Bool[Tensor, "rows ctx"]


class DictlearnError(Exception):
    """An error for the user: states the rule, the value and the choices; shown without a traceback."""


class Stopped(DictlearnError):
    """A signal ended the run; in a sweep, the jobs after it do not start."""


class FormatError(DictlearnError):
    """A dictionary on disk does not have the declared layout."""


class Site(NamedTuple):
    """A place in a language model: the input or the output of one module.

    `name` is what the user wrote (`resid_post.2`, or a module path); `module` is the path in
    `model.named_modules()`.
    """

    name: str
    module: str
    io: Literal["in", "out"]


class SparseLatents(NamedTuple):
    """The sparse code of `n_tokens` tokens, row-compressed: token t owns `offsets[t]:offsets[t + 1]`.

    `indices` of one token are distinct. Values may be zero (a selected latent whose pre-activation was not
    positive); a latent is *active* where its value is not zero.
    """

    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " n_tokens_plus_1"]
    n_latents: int

    @property
    def n_tokens(self) -> int:
        return len(self.offsets) - 1

    def to_dense(self) -> Float[Tensor, "n_tokens n_latents"]:
        counts = self.offsets.diff()
        rows = torch.repeat_interleave(counts, output_size=len(self.indices))
        dense = self.values.new_zeros(self.n_tokens, self.n_latents)
        return dense.index_put((rows, self.indices), self.values)

    @staticmethod
    def from_dense(latents: Float[Tensor, "n_tokens n_latents"]) -> SparseLatents:
        """Every non-zero entry of `latents`, in row order."""
        rows, indices = latents.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(latents))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseLatents(latents[rows, indices], indices, offsets, latents.shape[-1])


Latents: TypeAlias = SparseLatents | Tensor  # compact, or dense [*, n_latents]


class Output(NamedTuple):
    """What a dictionary returns: `latents` dense `[*, n_latents]`, `recon` `[*, d_out]` in raw units."""

    recon: Tensor
    latents: Tensor
    pre_acts: Tensor | None


class Encoded(NamedTuple):
    """The latents of a training step, and the dense pre-activations where the penalty needs them."""

    latents: Latents
    pre_acts: Tensor | None = None


LatentRows: TypeAlias = Mapping[str, Tensor]
"""The weights of some latents by parameter, one row for each latent, with the site axes flattened."""


@dataclass(frozen=True)
class Step:
    """One training step of one dictionary, in normalised units, with the site axes flattened.

    `x` [batch, n_reads * d_in], `target` and `recon` [batch, n_writes * d_out]; `variance` [n_writes] is the
    mean over tokens of ||target - mean||^2 per write site, a constant of the run, so that losses and coefficients
    mean the same at every batch size and activation scale. `dead` lists the latents counted as dead, or is None
    when there are none. `pre_acts` are dense, and there where the sparsifier's penalty needs them.

    What a training loop may add: `dead_rows` are their weights, to learn through in place of the dictionary's own.
    Of a step that is a chunk of a batch, `residual_variance` is the whole batch's mean of ||r - mean r||^2 over its
    tokens, with r = target - recon. With stream=sequences, `clean` is the LM on the rows that the tokens are from;
    it is None in a chunk.
    """

    dictionary: Dictionary
    x: Float[Tensor, "batch reads"]
    target: Float[Tensor, "batch writes"]
    recon: Float[Tensor, "batch writes"]
    latents: Latents
    variance: Float[Tensor, " n_writes"]
    dead: Int[Tensor, " n_dead"] | None = None
    pre_acts: Float[Tensor, "batch n_latents"] | None = None
    dead_rows: LatentRows | None = None
    residual_variance: Scalar | None = None
    clean: CleanRun | None = None

    def per_site(self, flat: Float[Tensor, "batch writes"]) -> Float[Tensor, "batch n_writes d_out"]:
        return flat.unflatten(-1, (len(self.variance), -1))

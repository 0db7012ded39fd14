"""What every evaluation block is given: the LM, the dictionaries and the held-out rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from dictlearn.dictionaries import Dictionary
from dictlearn.lm.load import LM
from dictlearn.lm.sites import resolve
from dictlearn.lm.taps import activations, widths
from dictlearn.types import DictlearnError, Site, SparseLatents

Sections = dict[str, Any]  # report sections by name: numbers, None, strings, lists and dicts of them
CHUNK_ELEMENTS = 2**26  # of one dense [n_tokens, n_latents] or [n_tokens, vocab] tensor


class RowBatch(NamedTuple):
    tokens: Int[Tensor, "rows ctx"]
    mask: Bool[Tensor, "rows ctx"]  # True = counted


@dataclass(frozen=True)
class EvaluationContext:
    """The LM, dictionaries for inference on its device, and the held-out rows they are evaluated on.

    Args:
        tokens: token ids of the rows.
        mask: which positions count. At the others nothing is measured and nothing is replaced.
        data: where the rows come from, for the report.
        batch_rows: rows in one LM forward.
        weight_files: the file of each dictionary that has one, for its sha256 in the report.
        means: mean activation over the counted tokens of all rows, by site; a cache, see `site_means`.
    """

    lm: LM
    dictionaries: Mapping[str, Dictionary]
    tokens: Int[Tensor, "n_rows ctx"]
    mask: Bool[Tensor, "n_rows ctx"]
    data: Mapping[str, Any] = field(default_factory=dict)
    batch_rows: int = 16
    weight_files: Mapping[str, Path] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise DictlearnError("Evaluation needs at least one dictionary, got none.")
        if not self.mask.any():
            raise DictlearnError(f"No token of the {len(self.tokens)} held-out rows is counted: all are masked.")
        if self.batch_rows < 1:
            raise DictlearnError(f"batch_rows must be at least 1, got {self.batch_rows}.")

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every read and write site of the dictionaries, by name."""
        names = (name for d in self.dictionaries.values() for name in (*d.reads, *d.writes))
        return {name: resolve(self.lm.model, name) for name in dict.fromkeys(names)}

    def check_widths(self) -> None:
        """Raise DictlearnError where a dictionary is not as wide as the site of the LM it is for."""
        found = widths(self.lm.model, list(self.sites.values()))
        for name, d in self.dictionaries.items():
            expected = [(site, d.d_in) for site in d.reads] + [(site, d.d_out) for site in d.writes]
            for site, width in expected:
                if found[site] != width:
                    raise DictlearnError(
                        f"Dictionary {name!r} is {width} wide at {site}, where {self.lm.name} is {found[site]} "
                        "wide: it was trained on another LM or site."
                    )

    def rows_of(self, n_tokens: int) -> int:
        """How many of the first rows hold at least `n_tokens` tokens (all of them where there are fewer)."""
        n_rows, ctx = self.tokens.shape
        return min(n_rows, -(-n_tokens // ctx))

    def batches(self, description: str, n_rows: int | None = None) -> Iterator[RowBatch]:
        """The first `n_rows` rows (None: all) on the LM's device, with a progress bar."""
        tokens, mask = self.tokens[:n_rows], self.mask[:n_rows]
        every = 0.1 if sys.stderr.isatty() else 10.0  # seconds
        with tqdm(total=len(tokens), desc=description, unit="row", mininterval=every) as bar:
            for rows in zip(tokens.split(self.batch_rows), mask.split(self.batch_rows), strict=True):
                yield RowBatch(*(part.to(self.lm.device) for part in rows))
                bar.update(len(rows[0]))

    def counted_activations(self, names: list[str], batch: RowBatch) -> dict[str, Float[Tensor, "n_counted _"]]:
        """Activations at the counted positions, by site name: `[n_counted, d]`, the width of each site."""
        acts = activations(self.lm.model, [self.sites[name] for name in names], batch.tokens)
        return {name: acts[name][batch.mask] for name in names}


@runtime_checkable
class EvaluationBlock(Protocol):
    """One part of an evaluation."""

    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        """The report sections it computed, by dictionary name; a list under `warnings` is for the reader."""
        ...


@torch.inference_mode()
def site_means(context: EvaluationContext, names: list[str]) -> dict[str, Tensor]:
    """Mean activation `[d]`, float64, of each site over the counted tokens of all rows: mean ablation's value.

    Sites missing in `context.means` cost one pass of the LM.
    """
    missing = [name for name in dict.fromkeys(names) if name not in context.means]
    if missing:
        totals: dict[str, Tensor] = {}
        for batch in context.batches("site means"):
            for name, acts in context.counted_activations(missing, batch).items():
                totals[name] = totals.get(name, 0) + acts.sum(0, dtype=torch.float64)
        context.means.update({name: total / context.mask.sum().item() for name, total in totals.items()})
    return {name: context.means[name] for name in names}


def reconstruct(dictionary: Dictionary, x: Tensor) -> Iterator[tuple[SparseLatents, Tensor]]:
    """Latents and reconstruction of the reads `x`, in chunks of tokens of `chunk_tokens(n_latents)`.

    `x` is `[n_tokens, d_in]` or `[n_tokens, n_reads, d_in]`, in any dtype; the dictionary works in its own.
    """
    for part in x.split(chunk_tokens(dictionary.n_latents)):
        latents = dictionary.encode_sparse(part)
        yield latents, dictionary.decode(latents, part)


def chunk_tokens(width: int) -> int:
    """Tokens at once, so that a dense `[n_tokens, width]` tensor keeps to CHUNK_ELEMENTS."""
    return max(1, CHUNK_ELEMENTS // width)

"""What every evaluation block is given: the LM, the dictionaries and the held-out rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dictlearn.data.planted import PlantedModel
from dictlearn.dictionaries import Dictionary
from dictlearn.lm.load import LM
from dictlearn.lm.sites import resolve
from dictlearn.lm.taps import activations, widths
from dictlearn.metrics.ratio import Places
from dictlearn.types import DictlearnError, Site, SparseLatents

# Report sections by name: numbers, None, strings, lists and dicts of them. Two names are not sections:
# `warnings`, a list for the reader, and `tables`, pandas tables by name that are written beside the report.
Sections = dict[str, Any]
MaskKey: TypeAlias = tuple[str, ...]  # the sites whose norms decide which tokens count; () without a norm filter
CHUNK_ELEMENTS = 2**26  # of one dense [n_tokens, n_latents] or [n_tokens, vocab] tensor


class RowBatch(NamedTuple):
    """Some rows, on the LM's device. `mask` is True where a token may count, `masks` where it does for the
    dictionaries of each key; `first_row` is the number of the first of them in the data set.
    """

    tokens: Int[Tensor, "rows ctx"]
    mask: Bool[Tensor, "rows ctx"]
    masks: dict[MaskKey, Bool[Tensor, "rows ctx"]]
    first_row: int

    def places(self, mask: Bool[Tensor, "rows ctx"]) -> Places:
        """Where the tokens of `mask` are in the data set, in row order."""
        rows, positions = mask.nonzero(as_tuple=True)
        return Places(rows + self.first_row, positions)


@dataclass(frozen=True)
class EvaluationContext:
    """The LM, dictionaries for inference on its device, and the held-out rows they are evaluated on.

    Args:
        tokens: token ids of the rows.
        mask: which positions may count. At the others nothing is measured and nothing is replaced.
        data: where the rows come from, for the report.
        batch_rows: rows in one LM forward.
        weight_files: the file of each dictionary that has one, for its sha256 in the report.
        max_norm_ratio: for a dictionary those tokens do not count either whose activation at any of its own sites
            has a norm above this many times the site's median norm (over the tokens of `mask`); None: no filter.
            Costs one pass of the LM.
        warnings: what the reader of a dictionary's report should know beforehand, by name.
        means: a cache, see `target_means`.
        norms: a cache, see `masks`.
    """

    lm: LM
    dictionaries: Mapping[str, Dictionary]
    tokens: Int[Tensor, "n_rows ctx"]
    mask: Bool[Tensor, "n_rows ctx"]
    data: Mapping[str, Any] = field(default_factory=dict)
    batch_rows: int = 16
    weight_files: Mapping[str, Path] = field(default_factory=dict)
    max_norm_ratio: float | None = None
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    means: dict[tuple[str, MaskKey], Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise DictlearnError("Evaluation needs at least one dictionary, got none.")
        if not self.mask.any():
            raise DictlearnError(f"No token of the {len(self.tokens)} held-out rows is counted: all are masked.")
        if self.batch_rows < 1:
            raise DictlearnError(f"batch_rows must be at least 1, got {self.batch_rows}.")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise DictlearnError(f"max_norm_ratio must be null or above 1, got {self.max_norm_ratio}.")

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every read and write site of the dictionaries, by name."""
        names = (name for d in self.dictionaries.values() for name in (*d.reads, *d.writes))
        return {name: resolve(self.lm.model, name) for name in dict.fromkeys(names)}

    def check_widths(self) -> None:
        """Raise DictlearnError, with one line for each, where a dictionary is not as wide as the LM's site."""
        found = widths(self.lm.model, list(self.sites.values()))
        if wrong := width_problems(self.dictionaries, found, self.lm.name):
            raise DictlearnError("\n".join(wrong))

    @property
    def planted(self) -> PlantedModel | None:
        """The model of planted activations; None where a language model gives them."""
        return self.lm.model if isinstance(self.lm.model, PlantedModel) else None

    # -- which tokens count --

    def mask_key(self, name: str) -> MaskKey:
        """Dictionaries with the same key count the same tokens."""
        d = self.dictionaries[name]
        return () if self.max_norm_ratio is None else tuple(sorted({*d.reads, *d.writes}))

    @cached_property
    def masks(self) -> dict[MaskKey, Bool[Tensor, "n_rows ctx"]]:
        """Which tokens count, by `mask_key`. With a norm filter the first use costs one pass of the LM.

        Raises DictlearnError where none is left.
        """
        if self.max_norm_ratio is None:
            return {(): self.mask}
        self._measure_norms()
        small = {site: self._norm_limit(site) for site in self.sites}
        masks = {}
        for name in self.dictionaries:
            key = self.mask_key(name)
            masks[key] = torch.stack([self.mask, *(small[site] for site in key)]).all(0)
            if not masks[key].any():
                raise DictlearnError(
                    f"No token is left for {name!r}: at one of {', '.join(key)} the norm of every one is above "
                    f"{self.max_norm_ratio} x the median, or not a number. Use a larger max_norm_ratio."
                )
        return masks

    def _norm_limit(self, site: str) -> Bool[Tensor, "n_rows ctx"]:
        """Where the norm at `site` is at most `max_norm_ratio` x the median; a norm that is NaN is not."""
        assert self.max_norm_ratio is not None
        norms = self.norms[site]
        numbers = norms[self.mask & ~norms.isnan()].numpy()
        return norms <= self.max_norm_ratio * float(np.median(numbers)) if len(numbers) else norms.isfinite()

    @torch.inference_mode()
    def _measure_norms(self) -> None:
        """Fill `norms`, `[n_rows, ctx]` float32 on the CPU by site."""
        if missing := [site for site in self.sites if site not in self.norms]:
            parts: dict[str, list[Tensor]] = {site: [] for site in missing}
            for batch in self._batches("norms", self.tokens, {}):
                for site, acts in self.activations(batch, missing).items():
                    parts[site].append(acts.float().norm(dim=-1).cpu())
            self.norms.update({site: torch.cat(rows) for site, rows in parts.items()})

    # -- batches --

    def rows_of(self, n_tokens: int) -> int:
        """How many of the first rows hold at least `n_tokens` tokens (all of them where there are fewer)."""
        n_rows, ctx = self.tokens.shape
        return min(n_rows, -(-n_tokens // ctx))

    def batches(self, description: str, n_rows: int | None = None) -> Iterator[RowBatch]:
        """The first `n_rows` rows (None: all) on the LM's device, with a progress bar."""
        yield from self._batches(description, self.tokens[:n_rows], self.masks)

    def _batches(
        self, description: str, tokens: Int[Tensor, "n_rows ctx"], masks: Mapping[MaskKey, Tensor]
    ) -> Iterator[RowBatch]:
        device = self.lm.device
        with progress(description, len(tokens), "row") as bar:
            for first in range(0, len(tokens), self.batch_rows):
                rows = slice(first, min(first + self.batch_rows, len(tokens)))
                own = {key: mask[rows].to(device) for key, mask in masks.items()}
                yield RowBatch(tokens[rows].to(device), self.mask[rows].to(device), own, first)
                bar.update(len(tokens[rows]))

    def activations(
        self, batch: RowBatch, names: Iterable[str] | None = None
    ) -> dict[str, Float[Tensor, "rows ctx _"]]:
        """Activations at all positions by site name, of the sites `names` (None: all of the dictionaries)."""
        sites = [self.sites[name] for name in (self.sites if names is None else names)]
        return activations(self.lm.model, sites, batch.tokens)


def progress(description: str, total: int, unit: str) -> tqdm[Any]:
    """A progress bar, which says little where no terminal shows it."""
    return tqdm(total=total, desc=description, unit=unit, mininterval=0.1 if sys.stderr.isatty() else 10.0)


@runtime_checkable
class EvaluationBlock(Protocol):
    """One part of an evaluation."""

    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        """The report sections it computed, by dictionary name; see `Sections` for `warnings` and `tables`."""
        ...


@runtime_checkable
class CheckedBlock(EvaluationBlock, Protocol):
    """A block that can say without the LM's weights why it cannot run."""

    def problems(
        self,
        model: PreTrainedModel,
        lm_name: str,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        dictionaries: Mapping[str, Dictionary],
    ) -> list[str]:
        """One sentence each; `model` has the LM's modules, `tokenizer` loads its tokenizer."""
        ...


@torch.inference_mode()
def target_means(context: EvaluationContext) -> dict[tuple[str, MaskKey], Tensor]:
    """Mean activation `[d]`, float64, of each write site over the tokens of all rows that count for the dictionary:
    what FVU is measured about and what mean ablation puts in. By write site and `mask_key`.

    Means missing in `context.means` cost one pass of the LM.
    """
    wanted = {(site, context.mask_key(name)) for name, d in context.dictionaries.items() for site in d.writes}
    if missing := sorted(wanted - context.means.keys()):
        totals: dict[tuple[str, MaskKey], Tensor] = {}
        for batch in context.batches("means"):
            acts = context.activations(batch, dict.fromkeys(site for site, _ in missing))
            for site, key in missing:
                total = acts[site][batch.masks[key]].sum(0, dtype=torch.float64)
                totals[site, key] = totals.get((site, key), 0) + total
        n_counted = {key: context.masks[key].sum().item() for _, key in missing}
        context.means.update({(site, key): total / n_counted[key] for (site, key), total in totals.items()})
    return {found: context.means[found] for found in wanted}


def width_problems(dictionaries: Mapping[str, Dictionary], widths: Mapping[str, int], lm_name: str) -> list[str]:
    """One sentence for every site whose width in the LM, `widths`, is not that of a dictionary."""
    return [
        f"Dictionary {name!r} is {width} wide at {site}, where {lm_name} is {widths[site]} wide: it was trained on "
        "another LM or site."
        for name, d in dictionaries.items()
        for site, width in dict.fromkeys([*((s, d.d_in) for s in d.reads), *((s, d.d_out) for s in d.writes)])
        if widths.get(site, width) != width
    ]


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

"""Statistics of the activations at each site: for input normalisation, data-dependent biases and outliers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.data.base import Read
from dictlearn.data.outliers import NormFilter, norms
from dictlearn.data.rows import RowStore
from dictlearn.kernels import layer_norm
from dictlearn.types import DictlearnError, TokenMask

N_MEDIAN = 16_384  # counted tokens that the limits of a norm filter are estimated on


class SiteStatistics(NamedTuple):
    """Of the raw activations x [d] at one site, over `n_tokens` counted tokens; sums are float64.

    Tokens that a norm filter leaves out count in `median_norm` and `n_filtered` alone. z is x after per-token layer
    normalisation (kernels/layer_norm.py).
    """

    mean_norm: float  # mean of ||x||; dividing by mean_norm / sqrt(d) makes the mean norm sqrt(d)
    mean: Float[Tensor, " d"]  # float64, on the CPU
    variance: float  # mean of ||x - mean||^2
    n_tokens: int
    median_norm: float  # median of ||x||, tokens left out included
    n_filtered: int  # counted tokens that are left out, because of this or another site
    layer_norm_mean: Float[Tensor, " d"]  # mean of z; float64, on the CPU
    layer_norm_variance: float  # mean of ||z - mean z||^2
    covariance: Float[Tensor, "d d"] | None = None  # of x, where asked for; float64, on the CPU
    layer_norm_covariance: Float[Tensor, "d d"] | None = None  # of z


@torch.no_grad()
def estimate_statistics(
    read: Read,
    store: RowStore,
    n_tokens: int = 65_536,
    lm_batch_rows: int = 32,
    norm_filter: NormFilter | None = None,
    covariances: Collection[str] = (),
) -> dict[str, SiteStatistics]:
    """Over the first rows with at least `n_tokens` counted tokens (or all): a function of the LM and the text.

    `read` runs the LM: token ids [rows, ctx] -> {site name: [rows, ctx, d]}. No stream is touched. Covariances are
    those of the sites named in `covariances`, at the cost of two products [d, n_tokens] @ [n_tokens, d] each.
    Raises DictlearnError when no token counts, the filter keeps none, or one that is kept is not finite.
    """
    sums: dict[str, _Sums] = {}
    n_counted = n_kept = 0
    for mask, acts in _prefix(read, store, n_tokens, lm_batch_rows):
        counted = {site: values[mask.to(values.device)] for site, values in acts.items()}  # [n, d]
        n_counted += len(next(iter(counted.values())))
        kept = None if norm_filter is None else norm_filter.keep(counted)
        for site, x in counted.items():
            sums.setdefault(site, _Sums(site in covariances)).add(x, x if kept is None else x[kept])
        n_kept = next(iter(sums.values())).n
    if n_counted == 0:
        raise DictlearnError(
            f"{store.name} must hold at least one counted token in its rows of {store.ctx}; it has none"
        )
    if n_kept == 0 and norm_filter is not None:
        raise DictlearnError(
            f"data.max_norm_ratio = {norm_filter.ratio} must leave activations to train on, but every one of "
            f"{n_counted} tokens is above the limit at one of the sites, or not finite ({norm_filter.describe()})"
        )
    return {site: total.statistics(site, n_counted - n_kept) for site, total in sums.items()}


@torch.no_grad()
def estimate_norm_filter(read: Read, store: RowStore, ratio: float, lm_batch_rows: int = 32) -> NormFilter:
    """Limits of `ratio` times the median norm of the first N_MEDIAN counted tokens (or all) at each site.

    Raises DictlearnError where that is not finite: more than half of the activations are NaN or infinite.
    """
    found: dict[str, list[Tensor]] = {}
    for mask, acts in _prefix(read, store, N_MEDIAN, lm_batch_rows):
        for site, values in acts.items():
            found.setdefault(site, []).append(norms(values[mask.to(values.device)]))
    return NormFilter(ratio, {site: ratio * _median(site, torch.cat(parts)) for site, parts in found.items()})


def _prefix(
    read: Read, store: RowStore, n_tokens: int, lm_batch_rows: int
) -> Iterator[tuple[TokenMask, Mapping[str, Tensor]]]:
    """(mask, activations) of the first rows with `n_tokens` counted tokens."""
    n_rows = store.wait_counted(n_tokens)
    for start in range(0, n_rows, lm_batch_rows):
        tokens = store.rows(start, min(start + lm_batch_rows, n_rows))
        yield store.mask(tokens), read(tokens)


def _median(site: str, values: Float[Tensor, " n"]) -> float:
    """NaN is above everything; of an even number of values the lower middle one; 0 of none."""
    if len(values) == 0:
        return 0.0
    median = float(values.nan_to_num(torch.inf, torch.inf).median())
    if median == float("inf"):
        raise DictlearnError(
            f"The activations at {site} must be finite, but most of {len(values)} are not: use lm.dtype=float32"
        )
    return median


class _Sums:
    """Running sums of one site: in float64, on the activations' device."""

    def __init__(self, with_covariance: bool) -> None:
        self.n, self.with_covariance = 0, with_covariance
        self.norms: list[Tensor] = []
        self.products = self.z_products = torch.tensor(0.0)
        self.total = self.squares = self.norm_total = self.z_total = self.z_squares = torch.tensor(0.0)

    def add(self, counted: Float[Tensor, "n_counted d"], kept: Float[Tensor, "n_kept d"]) -> None:
        """Activations of the next counted tokens, and those of them that are kept."""
        self.norms.append(norms(counted))
        if len(kept) == 0:
            return
        x = kept.double()
        z = layer_norm(x).z
        self.n += len(x)
        self.total = self.total + x.sum(0)
        self.squares = self.squares + x.square().sum()
        self.norm_total = self.norm_total + x.norm(dim=-1).sum()
        self.z_total = self.z_total + z.sum(0)
        self.z_squares = self.z_squares + z.square().sum()
        if self.with_covariance:
            self.products = self.products + x.T @ x
            self.z_products = self.z_products + z.T @ z

    def statistics(self, site: str, n_filtered: int) -> SiteStatistics:
        if not bool(self.norm_total.isfinite()):
            raise DictlearnError(
                f"The activations at {site} must be finite, but some of {self.n} counted tokens have NaN or "
                f"infinite ones: use lm.dtype=float32, or leave such tokens out with data.max_norm_ratio=10"
            )
        mean, z_mean = self.total.cpu() / self.n, self.z_total.cpu() / self.n
        return SiteStatistics(
            mean_norm=float(self.norm_total) / self.n,
            mean=mean,
            variance=_variance(self.squares, mean, self.n),
            n_tokens=self.n,
            median_norm=_median(site, torch.cat(self.norms)),
            n_filtered=n_filtered,
            layer_norm_mean=z_mean,
            layer_norm_variance=_variance(self.z_squares, z_mean, self.n),
            covariance=_covariance(self.products, mean, self.n) if self.with_covariance else None,
            layer_norm_covariance=_covariance(self.z_products, z_mean, self.n) if self.with_covariance else None,
        )


def _variance(squares: Tensor, mean: Float[Tensor, " d"], n: int) -> float:
    return max(float(squares) / n - float(mean.square().sum()), 0.0)


def _covariance(products: Tensor, mean: Float[Tensor, " d"], n: int) -> Float[Tensor, "d d"]:
    return products.cpu() / n - mean.outer(mean)

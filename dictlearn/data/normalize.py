"""Statistics of the activations at each site, for input normalisation and data-dependent biases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.data.stream import Read
from dictlearn.data.tokens import TokenStore
from dictlearn.types import DictlearnError


class SiteStatistics(NamedTuple):
    """Of the raw activations x [d] at one site, over `n_tokens` counted tokens; sums are float64."""

    mean_norm: float  # mean of ||x||; dividing by mean_norm / sqrt(d) makes the mean norm sqrt(d)
    mean: Float[Tensor, " d"]  # float64, on the CPU
    variance: float  # mean of ||x - mean||^2
    n_tokens: int


@torch.no_grad()
def estimate_statistics(
    read: Read, store: TokenStore, n_tokens: int = 65_536, lm_batch_rows: int = 32
) -> dict[str, SiteStatistics]:
    """Over the first rows with at least `n_tokens` counted tokens (or all): a function of the LM and the text.

    `read` runs the LM: token ids [rows, ctx] -> {site name: [rows, ctx, d]}. No stream is touched.
    Raises DictlearnError when no token counts.
    """
    n_rows = store.wait_counted(n_tokens)
    sums: dict[str, dict[str, Tensor]] = {}
    n_counted = 0
    for start in range(0, n_rows, lm_batch_rows):
        tokens = store.rows(start, min(start + lm_batch_rows, n_rows))
        mask = store.mask(tokens)  # [rows, ctx]
        n_counted += int(mask.sum())
        for site, acts in read(tokens).items():
            x = acts[mask.to(acts.device)].double()  # [n_counted, d]
            squares = x.square().sum(-1)
            terms = {"total": x.sum(0), "norms": squares.sqrt().sum(), "squares": squares.sum()}
            before = sums.get(site)
            sums[site] = terms if before is None else {key: before[key] + terms[key] for key in terms}
    if n_counted == 0:
        raise DictlearnError(
            f"{store.name} must hold at least one counted token in its rows of {store.ctx}; it has none"
        )
    return {site: _statistics(total, n_counted) for site, total in sums.items()}


def _statistics(sums: dict[str, Tensor], n_tokens: int) -> SiteStatistics:
    mean = sums["total"].cpu() / n_tokens
    variance = float(sums["squares"]) / n_tokens - float(mean.square().sum())
    return SiteStatistics(float(sums["norms"]) / n_tokens, mean, max(variance, 0.0), n_tokens)

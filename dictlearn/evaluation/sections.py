"""Metrics as parts of a report: numbers over several sites, over positions, and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.metrics.ratio import TokenRatio, clustered_stderr

DENSITY_EDGES = torch.arange(-80, 1, dtype=torch.float64) / 10  # log10 of the share of tokens


def per_site(
    values: Mapping[str, Float[Tensor, "*n_sites"]], ratios: Mapping[str, TokenRatio], sites: Sequence[str]
) -> dict[str, Any]:
    """Each value's mean over the sites, and under `stderr` the standard error of those that `ratios` have.

    With several sites their own numbers are under `per_site`, by name, as well.
    """
    section: dict[str, Any] = {name: float(value.mean()) for name, value in values.items()}
    section["stderr"] = {
        name: float(clustered_stderr(ratio.influence.mean(-1), ratio.n_rows_seen)) for name, ratio in ratios.items()
    }
    if len(sites) > 1:
        section["per_site"] = {
            site: {name: float(value[i]) for name, value in values.items()}
            | {"stderr": {name: float(ratio.stderr[i]) for name, ratio in ratios.items()}}
            for i, site in enumerate(sites)
        }
    return section


def per_position(
    values: Float[Tensor, " n_positions"], n_tokens: Int[Tensor, " n_positions"]
) -> list[float | None]:
    """None at positions where nothing is counted."""
    return [value if n else None for value, n in zip(values.tolist(), n_tokens.tolist(), strict=True)]


def l0_histogram(n_tokens_with: Tensor) -> dict[str, list[int]]:
    """The L0 values that occur, and on how many tokens each does."""
    (values,) = n_tokens_with.nonzero(as_tuple=True)
    return {"l0": values.tolist(), "n_tokens": n_tokens_with[values].tolist()}


def density_histogram(density: Float[Tensor, " n_latents"]) -> dict[str, list[float] | list[int]]:
    """How many of the latents that are not dead have a density in each tenth of a decade, 1e-8 to 1."""
    log10 = density[density > 0].log10().cpu()
    counts = log10.clamp(min=DENSITY_EDGES[0].item()).histogram(DENSITY_EDGES).hist.long()  # [n_bins]
    return {
        "log10_low": DENSITY_EDGES[:-1].tolist(),
        "log10_high": DENSITY_EDGES[1:].tolist(),
        "n_latents": counts.tolist(),
    }

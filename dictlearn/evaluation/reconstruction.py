"""The block `sparsity` and `reconstruction`: one LM pass for all dictionaries together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.context import EvaluationContext, Sections, chunk_tokens, reconstruct
from dictlearn.metrics.alignment import Alignment
from dictlearn.metrics.geometry import duplicates
from dictlearn.metrics.sparsity import L0, FiringCounts
from dictlearn.metrics.variance import Variance

DENSITY_EDGES = torch.arange(-80, 1, dtype=torch.float64) / 10  # log10 of the share of tokens


class Reconstruction:
    """Sparsity and reconstruction on every counted token of the rows."""

    @torch.inference_mode()
    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        accounts = {name: _Account(d) for name, d in context.dictionaries.items()}
        for batch in context.batches("reconstruction"):
            acts = context.counted_activations(list(context.sites), batch)
            for account in accounts.values():
                account.update(acts)
        for account in accounts.values():
            context.means.update(account.target_means())
        return {name: account.sections() for name, account in accounts.items()}


class _Account:
    """The metrics of one dictionary."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        n_writes, device = len(dictionary.writes), dictionary.W_dec.device
        self.variance = Variance(n_writes, dictionary.d_out).to(device)
        self.alignment = Alignment(n_writes).to(device)
        self.l0 = L0(dictionary.n_latents).to(device)
        self.firing = FiringCounts(dictionary.n_latents).to(device)

    def update(self, acts: Mapping[str, Tensor]) -> None:
        d = self.dictionary
        targets = d.select_writes(acts)  # [n_tokens, d_out] or [n_tokens, n_writes, d_out]
        targets = targets.unflatten(0, (-1, 1)) if targets.ndim == 2 else targets
        parts = zip(targets.split(chunk_tokens(d.n_latents)), reconstruct(d, d.select_reads(acts)), strict=True)
        for target, (latents, recon) in parts:
            self.l0.update(latents)
            self.firing.update(latents)
            recon = recon.reshape(target.shape)  # [n_tokens, n_writes, d_out]
            self.variance.update(target, recon)
            self.alignment.update(target, recon)

    def target_means(self) -> dict[str, Tensor]:
        return dict(zip(self.dictionary.writes, self.variance.mean, strict=True))

    def sections(self) -> Sections:
        n_tokens = int(self.firing.n_tokens)
        firing, alignment = self.firing.compute(), self.alignment.compute()
        n_zero_norm = int(alignment.pop("n_zero_norm").sum())
        values = self.variance.compute() | alignment
        return {
            "sparsity": {
                "l0": {name: float(value) for name, value in self.l0.compute().items()},
                "n_dead": int(firing.pop("n_dead")),
                **{name: float(value) for name, value in firing.items()},
                "n_tokens": n_tokens,
            },
            "geometry": {"n_duplicates": int(duplicates(self.dictionary.flat_W_dec).sum())},
            "reconstruction": {
                **per_site(values, self.dictionary.writes),
                "n_zero_norm": n_zero_norm,
                "n_tokens": n_tokens,
            },
            "histograms": {
                "l0": l0_histogram(self.l0.n_tokens_with),
                "density": density_histogram(self.firing.density),
            },
        }


def per_site(values: Mapping[str, Float[Tensor, "*n_sites"]], sites: tuple[str, ...]) -> dict[str, Any]:
    """Each value's mean over the sites; with several, a dict by site name under `per_site` as well."""
    section: dict[str, Any] = {name: float(value.mean()) for name, value in values.items()}
    if len(sites) > 1:
        section["per_site"] = {
            site: {name: float(value[i]) for name, value in values.items()} for i, site in enumerate(sites)
        }
    return section


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

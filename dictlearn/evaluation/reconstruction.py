"""The block `reconstruction`: sparsity, geometry and reconstruction, one LM pass for all dictionaries together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.context import (
    EvaluationContext,
    Sections,
    chunk_tokens,
    reconstruct,
    target_means,
)
from dictlearn.evaluation.latents import latent_table
from dictlearn.evaluation.sections import density_histogram, l0_histogram, per_position, per_site
from dictlearn.metrics.alignment import alignment
from dictlearn.metrics.geometry import nearest
from dictlearn.metrics.ratio import Places, TokenRatio
from dictlearn.metrics.sparsity import L0, LatentValues, n_active
from dictlearn.metrics.variance import TokenFVU, Variance
from dictlearn.types import SparseLatents

RATIOS = ("fvu", "cosine", "l2_ratio", "relative_bias")  # the numbers of `reconstruction` with a standard error
BY_THRESHOLD = ("n_below", "frac_over", "mass_over")  # dicts by threshold of the density
WORSE_THAN_MEAN = 1 + 1e-6  # FVU; the rest is rounding


class Reconstruction:
    """Sparsity and reconstruction on every counted token of the rows; docs/evaluation.md says what each number is.

    Two LM passes, however many dictionaries: one for the means of the targets, one for all the rest. Masked tokens
    (special ones, and those of the norm filter) enter `fvu_incl_masked` and nothing else.
    """

    @torch.inference_mode()
    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        means = target_means(context)
        n_rows, ctx = context.tokens.shape
        accounts: dict[str, _Account] = {}
        for name, d in context.dictionaries.items():
            mean = torch.stack([means[site, context.mask_key(name)] for site in d.writes])
            accounts[name] = _Account(d, mean, n_rows, ctx)
        for batch in context.batches("reconstruction"):
            acts = context.activations(batch)
            for key, mask in batch.masks.items():
                own = [account for name, account in accounts.items() if context.mask_key(name) == key]
                _update(own, acts, batch.places(mask), mask)
        return {name: account.sections() for name, account in accounts.items()}


def _update(accounts: Sequence[_Account], acts: Mapping[str, Tensor], places: Places, mask: Tensor) -> None:
    """Give activations `[rows, ctx, d]` to dictionaries that count the tokens of `mask`, which are at `places`."""
    sites = dict.fromkeys(site for a in accounts for site in (*a.dictionary.reads, *a.dictionary.writes))
    counted = {site: acts[site][mask] for site in sites}  # [n_counted, d]
    masked = {site: acts[site][~mask] for site in sites}
    for account in accounts:
        account.update(counted, places)
        account.update_masked(masked)


class _Account:
    """The metrics of one dictionary, `mean` that of its target, over `n_rows` rows of `ctx` tokens."""

    def __init__(
        self, dictionary: Dictionary, mean: Float[Tensor, "n_writes d_out"], n_rows: int, ctx: int
    ) -> None:
        self.dictionary, self.mean = dictionary, mean
        n_writes, device = len(dictionary.writes), dictionary.b_dec.device
        self.variance = Variance(n_writes, dictionary.d_out).to(device)
        self.variance_masked = Variance(n_writes, dictionary.d_out).to(device)
        self.token_fvu = TokenFVU(n_writes).to(device)
        self.ratios = {name: TokenRatio(n_rows, ctx, n_writes).to(device) for name in RATIOS}
        self.l0 = L0(dictionary.n_latents).to(device)
        self.mean_l0 = TokenRatio(n_rows, ctx).to(device)
        self.latents = LatentValues(dictionary.n_latents).to(device)

    def update(self, acts: Mapping[str, Tensor], places: Places) -> None:
        """`acts`: `[n_tokens, d]` by site, at the counted tokens; `places`: where these are."""
        first = 0
        for latents, target, recon in self._parts(acts):
            here = places.select(slice(first, first + len(target)))
            first += len(target)
            self.l0.update(latents)
            self.mean_l0.update(here, n_active(latents).unsqueeze(-1).double())
            self.latents.update(latents)
            self.variance.update(target, recon)
            sse = (target.double() - recon.double()).square().sum(-1)  # [n_tokens, n_writes]
            spread = (target.double() - self.mean).square().sum(-1)
            self.token_fvu.update(sse, spread)
            self.ratios["fvu"].update(here, sse, spread)
            for name, parts in alignment(target, recon).items():
                self.ratios[name].update(here, *parts)

    def update_masked(self, acts: Mapping[str, Tensor]) -> None:
        """The same at the masked tokens."""
        for _, target, recon in self._parts(acts):
            self.variance_masked.update(target, recon)

    def _parts(self, acts: Mapping[str, Tensor]) -> Iterator[tuple[SparseLatents, Tensor, Tensor]]:
        """Latents, target and reconstruction, `[n_tokens, n_writes, d_out]`, a chunk of tokens at a time."""
        d = self.dictionary
        targets = d.select_writes(acts)  # [n_tokens, d_out] or [n_tokens, n_writes, d_out]
        if len(targets) == 0:
            return
        targets = targets.reshape(len(targets), len(d.writes), d.d_out)
        parts = zip(targets.split(chunk_tokens(d.n_latents)), reconstruct(d, d.select_reads(acts)), strict=True)
        for target, (latents, recon) in parts:
            yield latents, target, recon.reshape(target.shape)

    def sections(self) -> Sections:
        neighbours = nearest(self.dictionary.flat_W_dec)
        return {
            "sparsity": self._sparsity(),
            "geometry": {
                "n_duplicates": neighbours.n_duplicates,
                "mean_max_decoder_cosine": float(neighbours.cosine.nanmean()),
            },
            "reconstruction": self._reconstruction(),
            "histograms": {
                "l0": l0_histogram(self.l0.n_tokens_with),
                "density": density_histogram(self.latents.density),
            },
            "warnings": self._warnings(),
            "tables": {"latents": latent_table(self.dictionary, self.latents, neighbours)},
        }

    def _sparsity(self) -> dict[str, Any]:
        counts: dict[str, Any] = {name: {} for name in BY_THRESHOLD}
        for name, value in self.latents.compute().items():
            number = int(value) if name.startswith("n_") else float(value)
            title, _, threshold = name.rpartition("_")
            counts |= {title: counts[title] | {threshold: number}} if title in BY_THRESHOLD else {name: number}
        l0 = {name: float(value) for name, value in self.l0.compute().items()}
        return {
            "l0": l0 | {"stderr": float(self.mean_l0.stderr)},
            "l1_mean": float(self.latents.l1_mean),
            **counts,
            "n_tokens": int(self.latents.n_tokens),
        }

    def _reconstruction(self) -> dict[str, Any]:
        everything = copy.deepcopy(self.variance)
        everything.merge_state(self.variance_masked)
        cosine = self.ratios["cosine"]
        n_tokens = int(self.latents.n_tokens)
        values = {
            **self.variance.compute(),
            "fvu_incl_masked": everything.compute()["fvu"],
            **self.token_fvu.compute(),
            **{name: ratio.ratio for name, ratio in self.ratios.items() if name != "fvu"},
        }
        n_per_position = self.mean_l0.position_bottom[:, 0].long()  # [ctx]
        course = self.ratios["fvu"].by_position  # [ctx, n_writes]
        section = per_site(values, self.ratios, self.dictionary.writes)
        for i, site in enumerate(section.get("per_site", {})):
            section["per_site"][site]["fvu_per_position"] = per_position(course[:, i], n_per_position)
        return {
            **section,
            "fvu_per_position": per_position(course.mean(-1), n_per_position),
            "n_tokens_per_position": n_per_position.tolist(),
            "n_zero_norm": n_tokens * len(self.dictionary.writes) - int(cosine.row_bottom.sum()),
            "n_tokens": n_tokens,
        }

    def _warnings(self) -> list[str]:
        fvus = self.variance.compute()["fvu"].reshape(-1).tolist()
        return [
            f"reconstruction.fvu at {site} is {fvu:.4g}: the mean of the target reconstructs it better"
            for site, fvu in zip(self.dictionary.writes, fvus, strict=True)
            if fvu > WORSE_THAN_MEAN
        ]

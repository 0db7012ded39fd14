"""The block `ground_truth`: the latents of a dictionary of planted activations against the features planted."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dictlearn.data.planted import FEATURE_VALUES, NAME, SITE, PlantedModel
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.context import EvaluationContext, Sections, chunk_tokens, reconstruct
from dictlearn.kernels import layer_norm
from dictlearn.lm.taps import activations
from dictlearn.metrics.geometry import nearest
from dictlearn.metrics.ground_truth import MATCHED, Detection, match
from dictlearn.metrics.sparsity import FiringCounts
from dictlearn.metrics.variance import Variance


class GroundTruth:
    """Which features a dictionary found, and how its latents fire with them, on all held-out tokens.

    Every feature is matched with one latent by the cosine of their directions (metrics/ground_truth.py). Where the
    activations are a language model's, nothing is known and nothing is reported.
    """

    @torch.inference_mode()
    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        model = context.planted
        if model is None:
            return {}
        own = {name: d for name, d in context.dictionaries.items() if (d.reads, d.writes) == ((NAME,), (NAME,))}
        accounts = {name: _Account(d, model) for name, d in own.items()}
        for batch in context.batches("ground truth"):
            acts = activations(model, [SITE, FEATURE_VALUES], batch.tokens)
            x, true = (acts[site.name].flatten(0, 1) for site in (SITE, FEATURE_VALUES))
            for account in accounts.values():
                account.update(x, true)
        why = f"ground_truth is left out: it is of dictionaries that read and write {NAME} alone"
        left_out: dict[str, Sections] = {
            name: {"warnings": [why]} for name in context.dictionaries if name not in own
        }
        return left_out | {name: account.sections() for name, account in accounts.items()}


class _Account:
    """The metrics of one dictionary against the features of `model`."""

    def __init__(self, dictionary: Dictionary, model: PlantedModel) -> None:
        self.dictionary, self.model = dictionary, model
        device = model.device
        self.matching = match(model.directions, dictionary.flat_W_dec, dictionary.sparsifier.signed)
        self.norms = dictionary.decoder_norms()[self.matching.latent] * self.matching.sign  # [n_features]
        self.detection = Detection(len(model.directions)).to(device)
        self.firing = FiringCounts(dictionary.n_latents).to(device)
        self.variance, self.floor = (Variance(1, dictionary.d_out).to(device) for _ in range(2))

    def update(self, x: Float[Tensor, "n_tokens d"], true: Float[Tensor, "n_tokens n_features"]) -> None:
        d = self.dictionary
        size = chunk_tokens(d.n_latents)
        self.floor.update(x.unsqueeze(1), (true @ self.model.directions + self.model.planted.bias).unsqueeze(1))
        reads = d.select_reads({NAME: x})
        for part, values, (latents, recon) in zip(
            x.split(size), true.split(size), reconstruct(d, reads), strict=True
        ):
            written = latents.to_dense()[:, self.matching.latent] * self.norms
            if d.input_norm == "layer_norm":
                written = written * layer_norm(part).std
            self.detection.update(values, written)
            self.firing.update(latents)
            self.variance.update(part.unsqueeze(1), d.split_writes(recon)[NAME].unsqueeze(1))

    def sections(self) -> Sections:
        table = self._table()
        section = {
            **self._summary(torch.ones(len(table), dtype=torch.bool)),
            "true_l0": float(self.detection.true_l0),
            "l0": float(self.firing.density.sum()),
            "n_latents": self.dictionary.n_latents,
            "frac_dead": float(self.firing.compute()["frac_dead"]),
            "fvu": float(self.variance.compute()["fvu"]),
            "fvu_of_truth": float(self.floor.compute()["fvu"]),
            "n_tokens": int(self.detection.n_tokens),
        }
        levels = torch.tensor(table.level)
        if levels.any():
            section["levels"] = [
                {"level": level, **self._summary(levels == level)} for level in range(int(levels.max()) + 1)
            ]
        warnings = []
        for what in (section, *section.get("levels", ())):
            if not what["frac_matched"]:
                what["shrinkage"] = None
                at = f" at level {what['level']}" if "level" in what else ""
                why = f"no feature is matched (cosine of {MATCHED} or more){at}"
                warnings.append(f"ground_truth.shrinkage is null: {why}")
        return {"ground_truth": section, "warnings": warnings, "tables": {"features": table}}

    def _summary(self, which: Bool[Tensor, " n_features"]) -> dict[str, Any]:
        """Of some of the features: shares and means."""
        which = which.to(self.model.device)
        cosine = self.matching.cosine[which]
        found = {name: value[which] for name, value in self.detection.by_feature.items()}
        found["shrinkage"] = found["shrinkage"][cosine >= MATCHED]
        alike = nearest(self.model.directions).cosine[which] >= MATCHED
        return {
            "n_features": len(cosine),
            "n_duplicates": int(alike.sum()),
            "frac_matched": float((cosine >= MATCHED).double().mean()),
            "mean_cosine": float(cosine.mean()),
            "mean_max_cosine": float(self.matching.max_cosine[which].mean()),
            **{name: float(values.nanmean()) for name, values in found.items()},
        }

    def _table(self) -> pd.DataFrame:
        """One row per feature; docs/evaluation.md says what the columns are."""
        assert self.model.features is not None
        forest = self.model.features.firing.forest
        latent = pd.Series(self.matching.latent.cpu().numpy(), dtype="Int64")
        parents = pd.Series(forest.parents, dtype="Int64")
        return pd.DataFrame(
            {
                "feature": range(len(latent)),
                "level": forest.levels,
                "parent": parents.mask(parents < 0),
                "count": self.detection.n_fires.cpu().numpy(),
                "nearest_cosine": nearest(self.model.directions).cosine.cpu().numpy(),
                "latent": latent.mask(latent < 0),
                "cosine": self.matching.cosine.cpu().numpy(),
                "max_cosine": self.matching.max_cosine.cpu().numpy(),
                **{name: values.cpu().numpy() for name, values in self.detection.by_feature.items()},
            }
        )

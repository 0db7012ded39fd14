"""Faithfulness: how much of a behaviour a circuit keeps, by its number of nodes.

    f(C) = (m(C) - m(0)) / (m(M) - m(0))

of means over pairs, never clipped: M is the whole model, 0 the model with all nodes ablated, errors and skip paths
included: write sites as the ablation has them, whatever cuts them. A circuit has candidates alone, which are nodes
with a score; the others stay ablated at every size. The complement's faithfulness f(M without C) is what Marks et
al. 2024 call completeness: low where nothing outside the circuit carries the behaviour as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.checks import check_choice
from dictlearn.circuits.ablation import Ablation
from dictlearn.circuits.cuts import Cut, check_cuts, record
from dictlearn.circuits.nodes import NO_SCORE, Nodes, NodeValues, Ranking, complement, everything, with_errors
from dictlearn.circuits.run import run_circuit
from dictlearn.lm import LM, model_of
from dictlearn.types import DictlearnError

ERRORS = ("scored", "kept", "removed")
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the candidates, as in MIB
FIXED = (10, 100, 1000)  # sizes at which circuits are compared across dictionaries
LEVELS = (0.5, 0.8, 0.95)
NEAR_ZERO = 1e-3  # of |m(M)|: an ablation that changes less is no yardstick
N_DRAWS = 1000


@dataclass(frozen=True)
class Curve:
    """The metric of every pair for circuits of growing size.

    `sizes` counts nodes (error nodes where they are scored) among `n_candidates`; `kept` and `left_out`
    [n_sizes, n] are the metric with the circuit and with its complement; `whole` and `none` [n] those of M and 0,
    `everything` [n] that with all nodes, candidates or not (and without errors, where these are removed).
    """

    sizes: tuple[int, ...]
    n_candidates: int
    kept: Float[Tensor, "n_sizes n"]
    left_out: Float[Tensor, "n_sizes n"]
    whole: Float[Tensor, " n"]
    none: Float[Tensor, " n"]
    everything: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        whole, none = float(self.whole.double().mean()), float(self.none.double().mean())
        if not abs(whole - none) > NEAR_ZERO * abs(whole):
            raise DictlearnError(
                f"Ablating all nodes changes the metric from {whole:.4g} to {none:.4g}: faithfulness has no "
                "yardstick. Take another ablation or more sites."
            )

    @property
    def faithfulness(self) -> Float[Tensor, " n_sizes"]:
        return self._share(self.kept)

    @property
    def complement_faithfulness(self) -> Float[Tensor, " n_sizes"]:
        return self._share(self.left_out)

    def _share(self, values: Float[Tensor, "n_sizes n"]) -> Float[Tensor, " n_sizes"]:
        kept, whole, none = (part.double().mean(-1) for part in (values, self.whole, self.none))
        return (kept - none) / (whole - none)

    def interval(self, seed: int = 0) -> Float[Tensor, "2 n_sizes"]:
        """The 95 % bootstrap interval of faithfulness over pairs."""
        n = len(self.whole)
        draws = torch.randint(n, (N_DRAWS, n), generator=torch.Generator().manual_seed(seed))
        parts = (self.kept, self.whole, self.none)
        kept, whole, none = (part.cpu().double()[..., draws].mean(-1) for part in parts)
        shares = (kept - none) / (whole - none)  # [n_sizes, N_DRAWS]
        return torch.from_numpy(np.nanquantile(shares.numpy(), (0.025, 0.975), axis=1))

    def table(self) -> pd.DataFrame:
        """One row for each size."""
        low, high = self.interval()
        columns = {
            "n_nodes": self.sizes,
            "fraction": [size / self.n_candidates for size in self.sizes],
            "faithfulness": self.faithfulness.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "complement_faithfulness": self.complement_faithfulness.tolist(),
        }
        return pd.DataFrame(columns)

    def n_at(self, level: float) -> float | None:
        """The number of nodes at which faithfulness first reaches `level`, between two sizes by the logarithm of
        the size; None where it does not.

        Raises DictlearnError for a level that is not above 0 and at most 1.
        """
        if not 0 < level <= 1:
            raise DictlearnError(f"level must be a share: above 0 and at most 1, got {level!r}.")
        found = self.faithfulness.tolist()
        for place, share in enumerate(found):
            if share < level or self.sizes[place] == 0:
                continue
            if place == 0 or self.sizes[place - 1] == 0:
                return float(self.sizes[place])
            part = (level - found[place - 1]) / (share - found[place - 1])
            low, high = math.log(self.sizes[place - 1]), math.log(self.sizes[place])
            return math.exp(low + part * (high - low))
        return None

    def at(self, size: int) -> float | None:
        """Faithfulness of the circuit of so many nodes, or of all candidates where they are fewer; None where it
        was not measured.
        """
        size = min(size, self.n_candidates)
        return float(self.faithfulness[self.sizes.index(size)]) if size in self.sizes else None

    def areas(self) -> tuple[float, float]:
        """CPR and CMD: the integrals of f and of |1 - f| over the fraction of nodes (MIB, Mueller et al. 2025)."""
        x = np.array(self.sizes) / self.n_candidates
        f = self.faithfulness.double().cpu().numpy()
        return float(np.trapezoid(f, x)), float(np.trapezoid(np.abs(1 - f), x))

    def summary(self) -> dict[str, Any]:
        """The numbers of a report; None where a level is not reached."""
        cpr, cmd = self.areas()
        last = {f"n_at_{level}": self.n_at(level) for level in LEVELS}
        metric = {"metric_clean": float(self.whole.double().mean())}
        metric |= {"metric_ablated": float(self.none.double().mean())}
        full = {
            "faithfulness_of_none": self.at(0),
            "faithfulness_of_candidates": self.at(self.n_candidates),
            "faithfulness_of_all": float(self._share(self.everything.unsqueeze(0))),
        }
        full |= {f"faithfulness_at_{size}": self.at(size) for size in FIXED}
        return {"cpr": cpr, "cmd": cmd} | last | full | metric | {"n_candidates": self.n_candidates}


def sizes_for(n_candidates: int, n_sizes: int = 20) -> tuple[int, ...]:
    """0, `n_sizes` numbers of nodes evenly apart in their logarithms, those of FRACTIONS, and FIXED, up to all."""
    spaced = np.geomspace(1, n_candidates, n_sizes).round().astype(int)
    fractions = (max(1, round(fraction * n_candidates)) for fraction in FRACTIONS)
    fixed = (size for size in FIXED if size < n_candidates)
    return tuple(sorted({0, *map(int, spaced), *fractions, *fixed}))


@torch.no_grad()
def curve(
    model: LM | PreTrainedModel,
    cuts: Sequence[Cut],
    ablation: Ablation,
    scores: Nodes,
    errors: str = "scored",
    order: str = "absolute",
    sizes: Sequence[int] | None = None,
) -> Curve:
    """Faithfulness over circuit sizes on the pairs of `ablation`, nodes taken in the order of `scores`.

    Args:
        errors: error nodes are "scored" and ranked like latents, all "kept", or all "removed"; in the last two a
            size counts latents alone.
        order: see `Ranking`.
        sizes: numbers of nodes, ascending; None: `sizes_for`.

    Raises DictlearnError where ablating all nodes does not change the metric.
    """
    check_choice("errors", errors, ERRORS)
    check_cuts(cuts)
    own = model_of(model)
    ranking = Ranking(scores, order, errors=errors == "scored")
    chosen = sizes_for(len(ranking)) if sizes is None else tuple(sizes)
    if list(chosen) != sorted(set(chosen)):
        raise DictlearnError(f"sizes must be ascending, got {list(chosen)}.")
    circuits = [_circuit(ranking.first(size), errors) for size in chosen]
    outside = [_circuit(complement(ranking.first(size)), errors) for size in chosen]
    empty, full = everything(scores, latents=False, errors=False), _circuit(everything(scores), errors)
    parts: list[Tensor] = []
    for chunk, ablated in ablation.chunks():
        whole = chunk.value(record(own, (), chunk.clean)[0])
        none = run_circuit(own, cuts, chunk, empty, ablated, skips=False)
        runs = [run_circuit(own, cuts, chunk, circuit, ablated) for circuit in (full, *circuits, *outside)]
        parts.append(torch.stack([whole, none, *runs]))
    values = torch.cat(parts, dim=1)
    (whole, none, of_all), rest = values[:3], values[3:]
    return Curve(chosen, len(ranking), rest[: len(chosen)], rest[len(chosen) :], whole, none, of_all)


def _circuit(nodes: dict[str, NodeValues], errors: str) -> dict[str, NodeValues]:
    return nodes if errors == "scored" else with_errors(nodes, errors == "kept")


def error_share(scores: Nodes) -> float:
    """The share of error nodes in the sum of absolute scores. Raises DictlearnError where no node has a score."""
    errors = sum(float(nodes.errors.abs().sum()) for nodes in scores.values())
    total = errors + sum(float(nodes.latents.abs().sum()) for nodes in scores.values())
    if total == 0:
        raise DictlearnError(NO_SCORE)
    return errors / total

"""Integrated gradients between the clean and the patch activations of each site (Sundararajan et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.checks import check_choice, check_count
from dictlearn.circuits.cuts import Acts, Cut, embeddings, last_logits
from dictlearn.circuits.methods.base import Method, gradients, recorded, scores_of
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch
from dictlearn.circuits.parts import widened
from dictlearn.lm.taps import capture, edit
from dictlearn.types import Site


class Quadrature(NamedTuple):
    """Points on the way from clean (0) to patch (1), and their weights."""

    points: Sequence[float]
    weights: Sequence[float]


def _left(n: int) -> Quadrature:
    return Quadrature([k / n for k in range(n)], [1 / n] * n)


def _midpoint(n: int) -> Quadrature:
    return Quadrature([(k + 0.5) / n for k in range(n)], [1 / n] * n)


def _gauss_legendre(n: int) -> Quadrature:
    points, weights = np.polynomial.legendre.leggauss(n)
    return Quadrature(((points + 1) / 2).tolist(), (weights / 2).tolist())


RULES: dict[str, Callable[[int], Quadrature]] = {
    "gauss_legendre": _gauss_legendre,
    "midpoint": _midpoint,
    "left": _left,
}
PATHS = ("site", "inputs")


class IntegratedGradients(Method):
    """The gradient along a straight path, times (patch - clean).

    Args:
        n_points: gradients on the path.
        rule: where they are: "gauss_legendre", "midpoint", or "left", which with 10 points is the setting of sparse
            feature circuits (Marks et al. 2024).
        path: "site": each site's activations go from clean to patch, one site at a time, while all others run on;
            n_points forwards and backwards for each site. "inputs": the token embeddings do, n_points passes for
            all sites together (EAP-IG, Hanna et al. 2024).
    """

    adds_up: ClassVar[bool] = True

    def __init__(self, n_points: int = 5, rule: str = "gauss_legendre", path: str = "site") -> None:
        check_count("n_points", n_points)
        check_choice("rule", rule, tuple(RULES))
        check_choice("path", path, PATHS)
        self.quadrature, self.path = RULES[rule](n_points), path

    def of_rows(
        self, model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch, positions: str
    ) -> dict[str, NodeValues]:
        clean, patch = recorded(model, cuts, batch)
        if self.path == "inputs":
            grads = self._along_inputs(model, cuts, batch)
        else:
            grads = {cut.name: self._along_each(model, cut, batch, clean, patch) for cut in cuts}
        return scores_of(cuts, batch, positions, clean, patch, grads)

    def _along_each(self, model: PreTrainedModel, cut: Cut, batch: PairBatch, clean: Acts, patch: Acts) -> Tensor:
        """The mean gradient at each write site, on the way to where its nodes move it: skip paths stay."""
        d, ends = cut.dictionary, cut.targets(patch)
        if d.W_skip is not None:
            ends = ends - cut.skipped(d.select_reads(patch)) + cut.skipped(d.select_reads(clean))
        found = [
            self._along(model, batch, site, clean[site.name], ends[..., place, :].to(clean[site.name].dtype))
            for place, site in enumerate(cut.writes)
        ]
        return torch.stack(found, dim=-2)

    def _along(self, model: PreTrainedModel, batch: PairBatch, site: Site, clean: Tensor, patch: Tensor) -> Tensor:
        """The mean gradient at `site` on the way from `clean` to `patch`."""
        mean = torch.zeros_like(widened(clean))
        for point, weight in zip(*self.quadrature, strict=True):
            x = torch.lerp(clean, patch, point).requires_grad_()
            with torch.enable_grad(), edit(model, {site: lambda _, x=x: x}):
                value = batch.value(last_logits(model, batch.clean)).sum()
            (grad,) = torch.autograd.grad(value, x)
            mean += weight * widened(grad)
        return mean

    def _along_inputs(self, model: PreTrainedModel, cuts: Sequence[Cut], batch: PairBatch) -> dict[str, Tensor]:
        """The mean gradient at all sites on the way of the token embeddings."""
        site = embeddings(model)
        ends = []
        for ids in (batch.clean, batch.patch):
            with torch.no_grad(), capture(model, [site]) as acts:
                last_logits(model, ids)
            ends.append(acts[site.name])
        total: dict[str, Tensor] = {}
        for point, weight in zip(*self.quadrature, strict=True):
            x = torch.lerp(ends[0], ends[1], point)
            with edit(model, {site: lambda _, x=x: x}):
                _, grads = gradients(model, cuts, batch, batch.clean)
            for name, grad in grads.items():
                total[name] = total.get(name, 0) + weight * widened(grad)
        return total

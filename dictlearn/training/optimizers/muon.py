"""Muon: momentum whose update is orthogonalised (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Muon as TorchMuon
from torch.optim import Optimizer

from dictlearn.checks import check_number, check_positive
from dictlearn.dictionaries import Dictionary
from dictlearn.training.optimizers.adam import Adam, is_share
from dictlearn.training.optimizers.base import Group, Make, OptimizerSettings, RunOptimizer
from dictlearn.types import DictlearnError

NEWTON_SCHULZ = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5, "eps": 1e-7}  # Jordan et al.


@dataclass(frozen=True)
class Muon(OptimizerSettings):
    """Muon for the matrices of one dictionary, Adam for the rest of it.

    Matrices are the weights with a row per latent and the skip path. What is read or written at several sites is
    one linear map, so site axes are flattened; of a cross-layer transcoder, each layer has its own matrices. The
    update is lr x 0.2 sqrt(max(shape)) times the orthogonalised momentum, as large as one of Adam's at any width.

    Args:
        lr: peak learning rate of the matrices.
        momentum: of Nesterov's kind, from 0 to below 1.
        weight_decay: a matrix shrinks by lr x weight_decay in a step. A unit decoder undoes that, and in the
            encoder it takes away pre-activations that the loss asks for, so 0 unless given.
        adam_lr, lr_factor, betas, eps: of Adam for the rest; adam_lr None: its law.
        clip_norm: largest gradient norm of the dictionary; None: no clipping.
    """

    lr: float
    momentum: float
    weight_decay: float
    adam_lr: float | None
    lr_factor: float
    betas: Sequence[float]
    eps: float
    clip_norm: float | None

    def __post_init__(self) -> None:
        check_positive("optimizer.lr", self.lr)
        check_number("optimizer.weight_decay", self.weight_decay)
        check_positive("optimizer.adam_lr", self.adam_lr, or_null=True)
        if not is_share(self.momentum):
            raise DictlearnError(f"optimizer.momentum must be a number from 0 to below 1, got {self.momentum!r}.")
        self.rest  # noqa: B018 - checks what is Adam's

    @property
    def rest(self) -> Adam:
        """What optimizes the parameters that are no matrices."""
        return Adam(self.adam_lr, self.lr_factor, self.betas, self.eps, self.clip_norm)

    def groups(self, dictionary: Dictionary) -> list[tuple[Make, Group]]:
        views = _matrices(dictionary)
        matrices = {p: views[name] for name, p in dictionary.named_parameters() if name in views}
        settings = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return [
            (
                MatrixMuon,
                {"params": list(matrices), "views": [tuple(view) for view in matrices.values()], **settings},
            ),
            self.rest.group(dictionary, [p for p in dictionary.parameters() if p not in matrices]),
        ]


class View(NamedTuple):
    """A parameter as matrices, [n_matrices, n_rows, all other axes] with `axis` first."""

    axis: int
    n_matrices: int
    n_rows: int


def _matrices(dictionary: Dictionary) -> dict[str, View]:
    """By parameter. Where each read site has latents of its own, each has an encoder and a skip path of its own."""
    n_maps = len(dictionary.reads) if dictionary.layered else 1
    latents = torch.arange(dictionary.n_latents, device=dictionary.b_dec.device)
    found = {}
    for name, axis, _ in dictionary.parts_of(latents):
        weight = dictionary.get_parameter(name)
        if weight.ndim > 1:
            n_rows = dictionary.n_latents // n_maps
            found[name] = View(axis, weight.shape[axis] // n_rows, n_rows)
    if dictionary.W_skip is not None:
        found["W_skip"] = View(0, n_maps, dictionary.b_dec.numel() // n_maps)
    return found


class MatrixMuon(RunOptimizer, TorchMuon):
    """Torch's Muon on parameters seen as matrices, by a `View` of each in the group; updates of Adam's size."""

    def __init__(self, groups: list[Group]) -> None:
        defaults = {"nesterov": True, "adjust_lr_fn": "match_rms_adamw", **NEWTON_SCHULZ}
        Optimizer.__init__(self, groups, defaults)  # Muon's own refuses more than two axes

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        view_of = dict(zip(group["params"], group["views"], strict=True))
        result = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        views = [view_of[p] for p in params_with_grad]
        for tensors in (params_with_grad, grads, muon_momentum_bufs):
            tensors[:] = [matrix for t, view in zip(tensors, views, strict=True) for matrix in _seen(t, *view)]
        return bool(result)


def _seen(tensor: Tensor, axis: int, n_matrices: int, n_rows: int) -> tuple[Tensor, ...]:
    """Views, so that they can be changed in place."""
    return tensor.movedim(axis, 0).view(n_matrices, n_rows, -1).unbind(0)

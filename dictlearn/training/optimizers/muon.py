"""Muon: momentum whose update is orthogonalised (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Muon as TorchMuon
from torch.optim import Optimizer

from dictlearn.checks import check_number, check_positive
from dictlearn.dictionaries import Dictionary
from dictlearn.training.optimizers.adam import Adam, is_share
from dictlearn.training.optimizers.base import Group, Make, OptimizerSettings, Part
from dictlearn.types import DictlearnError

NEWTON_SCHULZ = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5, "eps": 1e-7}  # Jordan et al.


@dataclass(frozen=True)
class Muon(OptimizerSettings):
    """Muon for the matrices of one dictionary, Adam for the rest of it.

    Matrices are the weights with a row per latent, the site axes of a row flattened (what is read or written at all
    sites is one linear map), and W_skip of single sites. Their update is lr x 0.2 sqrt(max(shape)) times the
    orthogonalised momentum, which has the size of one of Adam's at any width.

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
        row_axes = {**dictionary.latent_axis, **({} if dictionary.site_axis else {"W_skip": 0})}
        matrices, axes, rest = [], [], []
        for name, parameter in dictionary.named_parameters():
            if name in row_axes and parameter.ndim > 1:
                matrices.append(parameter)
                axes.append(row_axes[name])
            else:
                rest.append(parameter)
        settings = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return [
            (RowMuon, {"params": matrices, "row_axes": axes, **settings}),
            self.rest.group(dictionary, rest),
        ]


class RowMuon(Part, TorchMuon):
    """Torch's Muon on matrices [rows, all other axes]; `row_axes` of a group is the axis of the rows, by parameter.

    Updates are scaled to the root mean square of Adam's.
    """

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
        axes = dict(zip(group["params"], group["row_axes"], strict=True))
        result = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        row_axes = [axes[p] for p in params_with_grad]
        for tensors in (params_with_grad, grads, muon_momentum_bufs):
            tensors[:] = [_by_row(t, axis) for t, axis in zip(tensors, row_axes, strict=True)]
        return bool(result)


def _by_row(tensor: Tensor, axis: int) -> Tensor:
    """A view [rows, all other axes]."""
    rows = tensor.movedim(axis, 0)
    return rows.view(len(rows), -1)

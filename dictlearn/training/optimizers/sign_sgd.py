"""Schedule-free signSGD (Bernstein et al. 2018; Defazio et al. 2024, arXiv 2405.15682)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from dictlearn.checks import check_positive
from dictlearn.dictionaries import Dictionary
from dictlearn.training.optimizers.base import Group, Make, OptimizerSettings, RunOptimizer, lr_law
from dictlearn.types import DictlearnError

LAW_LR = 5e-3  # of EleutherAI's sparsify


@dataclass(frozen=True)
class SignSGD(OptimizerSettings):
    """Schedule-free signSGD for one dictionary: half of Adam's memory, and no decay of the learning rate to plan.

    An average takes the place of decay: `schedule.decay` is 0 unless given. There is no clipping: it changes no
    sign. What is saved and evaluated is the average x; gradients and metrics in training are those of y.

    Args:
        lr: peak learning rate; None: `lr_factor` x 5e-3 / sqrt(n_latents / 2^14).
        lr_factor: multiplies the law.
        momentum: share of the average in the weights that are trained on, above 0 and below 1.
    """

    decay: ClassVar[float] = 0.0
    clip_norm = None

    lr: float | None
    lr_factor: float
    momentum: float

    def __post_init__(self) -> None:
        check_positive("optimizer.lr", self.lr, or_null=True)
        check_positive("optimizer.lr_factor", self.lr_factor)
        check_positive("optimizer.momentum", self.momentum)
        if self.momentum >= 1:
            raise DictlearnError(f"optimizer.momentum must be above 0 and below 1, got {self.momentum!r}.")

    def groups(self, dictionary: Dictionary) -> list[tuple[Make, Group]]:
        lr = self.lr or self.lr_factor * lr_law(LAW_LR, dictionary.n_latents)
        return [(ScheduleFreeSign, {"params": list(dictionary.parameters()), "lr": lr, "momentum": self.momentum})]


class ScheduleFreeSign(RunOptimizer):
    """In step t, with the gradient g at y, the learning rate r_t and momentum b:

        z' = z - r_t sign(g);  x' = (1 - c) x + c z';  y' = (1 - b) z' + b x'
        c = R_t^2 / sum over s <= t of R_s^2, where R_t is the largest learning rate so far

    The parameters hold y, the state z; x follows from both. With u = sign(g), y' = (1 - c) y + c z +
    r_t (b (1 - c) - 1) u: a step takes four passes. Where decoder rows are unit, y is projected after a step, and z
    and x are scaled alike: z, which nothing else holds, would grow until y were mostly z. The average is projected
    where it is taken.
    """

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, {"largest_lr": 0.0, "sum_sq_lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            group["largest_lr"] = max(group["largest_lr"], lr)
            group["sum_sq_lr"] += group["largest_lr"] ** 2
            share = group["largest_lr"] ** 2 / group["sum_sq_lr"]
            for weight in (p for p in group["params"] if p.grad is not None):
                sign, z = weight.grad.sign_(), self._z(weight)
                weight.lerp_(z, share).add_(sign, alpha=lr * (momentum * (1 - share) - 1))
                z.add_(sign, alpha=-lr)
        return loss

    def _z(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "z" not in state:
            state["z"] = weight.detach().clone()
        return state["z"]

    @torch.no_grad()
    def project_(self, dictionary: Dictionary) -> None:
        unit = [rows for rows in dictionary.decoders if "z" in self.state.get(rows, {})]
        unit = unit if dictionary.decoder_norm == "unit" else []
        norms = [rows.flatten(1).norm(dim=-1) for rows in unit]
        dictionary.project_()
        for rows, norm in zip(unit, norms, strict=True):
            scale = torch.where(norm > 0, norm, 1.0)
            self.state[rows]["z"].div_(scale.view(-1, *[1] * (rows.ndim - 1)))

    def average(self, weight: Tensor) -> Tensor | None:
        if "z" not in self.state.get(weight, {}):
            return None
        (momentum,) = (g["momentum"] for g in self.param_groups if any(p is weight for p in g["params"]))
        return weight.detach().lerp(self.state[weight]["z"], 1 - 1 / momentum)  # y = (1 - b) z + b x

    @torch.no_grad()
    def restart_rows_(self, weight: Tensor, axis: int, rows: Int[Tensor, " n"]) -> None:
        """Both sequences go on from the new values."""
        if "z" in self.state.get(weight, {}):
            self.state[weight]["z"].index_copy_(axis, rows, weight.detach().index_select(axis, rows))

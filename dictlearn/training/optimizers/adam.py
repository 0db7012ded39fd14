"""Adam: one fused step over all dictionaries that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Adam as TorchAdam

from dictlearn.checks import check_positive
from dictlearn.dictionaries import Dictionary
from dictlearn.training.optimizers.base import Group, Make, OptimizerSettings, RunOptimizer, lr_law
from dictlearn.types import DictlearnError

LAW_LR = 2e-4  # of Gao et al. 2024, arXiv 2406.04093


@dataclass(frozen=True)
class Adam(OptimizerSettings):
    """Adam for one dictionary (Kingma & Ba 2015).

    Args:
        lr: peak learning rate; None: `lr_factor` x 2e-4 / sqrt(n_latents / 2^14).
        lr_factor: multiplies the law; short runs are limited by steps, so they want more than 1.
        betas, eps: as in the paper; eps is far below the gradients of a normalised loss.
        clip_norm: largest gradient norm of the dictionary; None: no clipping.
    """

    lr: float | None
    lr_factor: float
    betas: Sequence[float]
    eps: float
    clip_norm: float | None

    def __post_init__(self) -> None:
        check_positive("optimizer.lr", self.lr, or_null=True)
        check_positive("optimizer.lr_factor", self.lr_factor)
        check_positive("optimizer.eps", self.eps)
        check_positive("optimizer.clip_norm", self.clip_norm, or_null=True)
        betas = list(self.betas) if isinstance(self.betas, Sequence) else []
        if len(betas) != 2 or not all(is_share(beta) for beta in betas):
            raise DictlearnError(f"optimizer.betas must be two numbers from 0 to below 1, got {self.betas}.")

    def peak_lr(self, dictionary: Dictionary) -> float:
        """The learning rate at the top of the schedule."""
        return self.lr or self.lr_factor * lr_law(LAW_LR, dictionary.n_latents)

    def group(self, dictionary: Dictionary, parameters: Sequence[Tensor]) -> tuple[Make, Group]:
        """The group of some parameters of `dictionary`."""
        settings = {"lr": self.peak_lr(dictionary), "betas": tuple(self.betas), "eps": self.eps}
        return fused_adam, {"params": list(parameters), **settings}

    def groups(self, dictionary: Dictionary) -> list[tuple[Make, Group]]:
        return [self.group(dictionary, list(dictionary.parameters()))]


def is_share(value: object) -> bool:
    """A number from 0 to below 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


class InMemoryOrder(RunOptimizer, TorchAdam):
    """Torch's Adam on views in the order of memory: its fused step copies the gradients of transposed weights."""

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> bool:
        lists = (params_with_grad, grads, exp_avgs, exp_avg_sqs)
        result = super()._init_group(group, *lists, max_exp_avg_sqs, state_steps)
        for tensors in lists:
            tensors[:] = [_in_memory_order(tensor) for tensor in tensors]
        return bool(result)


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.permute(sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis)))


fused_adam: Make = partial(InMemoryOrder, fused=True)

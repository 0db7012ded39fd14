"""The optimizer: one fused Adam, one parameter group per dictionary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Adam as TorchAdam

from dictlearn.dictionaries import Dictionary
from dictlearn.types import DictlearnError

LAW_LR, LAW_LATENTS = 2e-4, 2**14  # the learning-rate law of Gao et al. 2024: 2e-4 / sqrt(n_latents / 2^14)


@dataclass(frozen=True)
class Adam:
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
        for name, optional in (("lr", True), ("lr_factor", False), ("eps", False), ("clip_norm", True)):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0) and not (value is None and optional):
                or_null = " or null" if optional else ""
                raise DictlearnError(f"optimizer.{name} must be a positive number{or_null}, got {value!r}.")
        betas = list(self.betas) if isinstance(self.betas, Sequence) else []
        if len(betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
            raise DictlearnError(f"optimizer.betas must be two numbers from 0 to below 1, got {self.betas}.")

    def peak_lr(self, dictionary: Dictionary) -> float:
        """The learning rate at the top of the schedule."""
        return self.lr or self.lr_factor * LAW_LR / (dictionary.n_latents / LAW_LATENTS) ** 0.5


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class InMemoryOrder(TorchAdam):
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


def build_optimizer(members: Sequence[tuple[Dictionary, Adam]]) -> TorchAdam:
    """One optimizer over all dictionaries, each a parameter group with its own settings."""
    groups = [
        {
            "params": list(dictionary.parameters()),
            "lr": adam.peak_lr(dictionary),
            "betas": tuple(adam.betas),
            "eps": adam.eps,
        }
        for dictionary, adam in members
    ]
    return InMemoryOrder(groups, fused=True)

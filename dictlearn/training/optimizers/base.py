"""What optimizers share: the settings for one dictionary, and several optimizers as one, which Lightning wants."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer

from dictlearn.dictionaries import Dictionary

LAW_LATENTS = 2**14  # learning-rate laws are rate / sqrt(n_latents / 2^14)
DECAY = 0.2


def lr_law(rate: float, n_latents: int) -> float:
    """`rate` at 2^14 latents, falling with the root of their number."""
    return rate / (n_latents / LAW_LATENTS) ** 0.5


class RunOptimizer(Optimizer):
    """A torch optimizer that a run can save, average and restart rows of."""

    def project_(self, dictionary: Dictionary) -> None:
        """After a step: `dictionary` back onto its constraint set."""
        dictionary.project_()

    def average(self, weight: Tensor) -> Tensor | None:  # noqa: ARG002
        """What is evaluated in place of `weight`; None where that is `weight` itself."""
        return None

    @torch.no_grad()
    def restart_rows_(self, weight: Tensor, axis: int, rows: Int[Tensor, " n"]) -> None:
        """Forget what is remembered of some rows of `weight`, which have new values."""
        for value in self.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.index_fill_(axis, rows, 0.0)


Group = dict[str, Any]
Make = Callable[[list[Group]], RunOptimizer]


class OptimizerSettings(ABC):
    """The optimizer of one dictionary.

    `clip_norm` is the largest gradient norm of the dictionary, None: no clipping. `decay` is the share of the run,
    at its end, over which the learning rate falls where the schedule leaves it open.
    """

    decay: ClassVar[float] = DECAY
    clip_norm: float | None

    @abstractmethod
    def groups(self, dictionary: Dictionary) -> list[tuple[Make, Group]]:
        """Parameter groups at their peak learning rates, each with what makes its optimizer of such groups."""


def build_optimizer(members: Sequence[tuple[Dictionary, OptimizerSettings]]) -> RunOptimizer:
    """One optimizer over all dictionaries, each with its own settings.

    `member` of a parameter group is the position of its dictionary. Groups of one kind are one optimizer.
    """
    by_make: dict[Make, list[Group]] = {}
    for index, (dictionary, settings) in enumerate(members):
        for make, group in settings.groups(dictionary):
            by_make.setdefault(make, []).append({**group, "member": index})
    parts = [make(groups) for make, groups in by_make.items()]
    return parts[0] if len(parts) == 1 else Together(parts)


class Together(RunOptimizer):
    """Several optimizers as one: its groups and its state are theirs, so that schedulers and checkpoints work."""

    def __init__(self, parts: Sequence[RunOptimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        self._part_of: dict[Tensor, RunOptimizer] = {}
        for part in self.parts:
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            part.state = self.state
            start += len(part.param_groups)
            self._part_of |= {p: part for group in part.param_groups for p in group["params"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # makes both anew: a state dict is loaded
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def project_(self, dictionary: Dictionary) -> None:
        self._part_of[dictionary.b_dec].project_(dictionary)

    def average(self, weight: Tensor) -> Tensor | None:
        return self._part_of[weight].average(weight)

    def restart_rows_(self, weight: Tensor, axis: int, rows: Int[Tensor, " n"]) -> None:
        self._part_of[weight].restart_rows_(weight, axis, rows)


@torch.no_grad()
def average_(optimizer: RunOptimizer, dictionary: Dictionary) -> dict[nn.Parameter, Tensor]:
    """Put the averages in the place of the weights, then onto the constraint set.

    Returns the weights as they were, to go on from; nothing where the optimizer does not average.
    """
    averages = {p: found for p in dictionary.parameters() if (found := optimizer.average(p)) is not None}
    trained = {p: p.detach().clone() for p in dictionary.parameters()} if averages else {}
    for parameter, value in averages.items():
        parameter.copy_(value)
    if averages:
        dictionary.project_()
    return trained

"""A loss whose gradients are taken before anyone asks for them, so that its graph need not be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dictlearn.types import Scalar


def with_gradients(parameters: Sequence[nn.Parameter], accumulate: Callable[[], Scalar]) -> Scalar:
    """A differentiable loss that has its gradients ready.

    `accumulate` returns the loss and adds its gradients to `.grad` of the parameters, in as many backward passes as
    it likes; what was in `.grad` before is left as it was. Differentiable once.
    """
    before = [parameter.grad for parameter in parameters]
    _set_gradients(parameters, [None] * len(parameters))
    loss = accumulate()
    gradients = [parameter.grad for parameter in parameters]
    _set_gradients(parameters, before)
    return _WithGradients.apply(loss, gradients, *parameters)  # type: ignore[no-any-return]


def _set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *_: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grads
        gradients = ctx.gradients
        del ctx.gradients  # with no other reference to them, they become `.grad` without a copy
        if grad.is_cuda or grad != 1:  # a look at it waits for a GPU
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad)
        return None, None, *gradients

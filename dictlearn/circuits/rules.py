"""Backward rules: the forward of a model as it is, with other gradients, by hooks and replaced forwards.

RelP (relevance patching, Jafari et al. 2025) takes the coefficients of layer-wise relevance propagation for the
gradient of attribution patching:
    norms: the denominator is a constant.
    activations: y = x * (act(x) / x), with the bracket a constant; at x = 0 its limit. ReLU has that slope already.
    gated products: each factor gets half of the product's gradient.
    attention, where asked for: the pattern is a constant.
With all of them, and no biases, the model is linear in its residual stream at the point where it is: activations
times coefficients add up to the metric at every cut (a softcap of the logits keeps its own gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dictlearn.circuits.parts import inverse_scale, normed, parts_of
from dictlearn.circuits.surgery import attention as explicit_attention
from dictlearn.circuits.surgery import replaced
from dictlearn.types import DictlearnError

NEAR_ZERO = 1e-6  # where act(x) / x is taken in place of x = 0


@contextmanager
def relevance(model: PreTrainedModel, attention: bool = False) -> Iterator[None]:
    """Inside the block gradients are coefficients of relevance; the forward is the model's own up to rounding.

    Args:
        attention: whether attention patterns are constants, so that no relevance goes to queries and keys.

    Raises DictlearnError for a family or a module without a rule, and for an activation that is not 0 at 0.
    """
    parts = parts_of(model)
    curved = [act for act in parts.activations if not isinstance(act, nn.ReLU)]
    _check_origin(model, curved)
    with ExitStack() as stack:
        stack.enter_context(frozen(model) if attention else _constant_scales(parts.norms))
        stack.enter_context(replaced({act: _secant(act.forward) for act in curved}))
        for mlp in parts.products:
            stack.callback(_halve(mlp.get_submodule("down_proj")).remove)
        yield


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block attention patterns and the denominators of norms are constants to the gradient.

    The forward is the model's own up to rounding. Raises DictlearnError for a family or a module that is not known.
    """
    with _constant_scales(parts_of(model).norms), explicit_attention(model, _constant_pattern):
        yield


def _constant_scales(norms: Sequence[nn.Module]):  # noqa: ANN202
    def forward_of(norm: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: normed(norm, x, inverse_scale(norm, x.detach()))

    return replaced({norm: forward_of(norm) for norm in norms})


def _constant_pattern(_: nn.Module, pattern: Tensor, value: Tensor) -> Tensor:
    return pattern.detach() @ value


def _secant(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        near = x.detach().masked_fill(x == 0, NEAR_ZERO)
        return x * (act(near) / near)

    return forward


def _halve(product_reader: nn.Module) -> RemovableHandle:
    """Halve the gradient of what a module reads, before other hooks see it: theirs is of the whole product."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        half = args[0] / 2
        return (half + half.detach(), *args[1:])

    return product_reader.register_forward_pre_hook(hook, prepend=True)


def _check_origin(model: PreTrainedModel, activations: Sequence[nn.Module]) -> None:
    zero = torch.zeros(1, dtype=model.dtype, device=model.device)
    for act in activations:
        with torch.no_grad():
            if act(zero).any():
                raise DictlearnError(
                    f"Relevance needs activations that are 0 at 0, {type(act).__name__} is {act(zero).item():g}."
                )

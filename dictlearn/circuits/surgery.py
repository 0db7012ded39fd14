"""Modules and attention of a model computed otherwise, for as long as a block lasts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from dictlearn.circuits.parts import parts_of

Forward = Callable[..., Any]
Mix = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""What takes the place of pattern @ value: of the attention module, its pattern `[rows, n_heads, ctx, ctx]` and its
values `[rows, n_heads, ctx, d_head]` (grouped ones repeated), the heads' outputs `[rows, n_heads, ctx, d_head]`."""

NARROW = (torch.float16, torch.bfloat16)
EXPLICIT = "dictlearn_explicit"  # the name of our attention among those of transformers
_mixes: dict[nn.Module, Mix] = {}  # by attention module, inside the blocks of `attention`


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Modules with another forward; hooks on them go on working. As before at the end, also after an error."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = functools.wraps(module.forward)(forward)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside the block weights and buffers in narrower types are float32 copies of themselves.

    The model's own are not touched, and back at the end, also after an error. A copy lives as long as the block and
    graphs of gradients that were made in it.
    """
    copies: dict[int, Tensor] = {}  # by identity: tied weights stay tied
    before = _narrow(model)
    try:
        for own, name, tensor in before:
            if id(tensor) not in copies:
                wide = tensor.detach().float()
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[id(tensor)] = nn.Parameter(wide, requires_grad=False) if is_parameter else wide
            own[name] = copies[id(tensor)]
        yield
    finally:
        for own, name, tensor in before:
            own[name] = tensor


def bytes_in_float32(model: nn.Module) -> int:
    """What the copies of `in_float32` take."""
    return 4 * sum({id(tensor): tensor.numel() for _, _, tensor in _narrow(model)}.values())


def _narrow(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Weights and buffers in narrower types than float32: where they are, their name there, and they."""
    return [
        (own, name, tensor)
        for module in model.modules()
        for own in (module._parameters, module._buffers)
        for name, tensor in own.items()
        if tensor is not None and tensor.dtype in NARROW
    ]


@contextmanager
def attention(model: PreTrainedModel, mix: Mix) -> Iterator[None]:
    """Attention by explicit patterns, with `mix` in place of pattern @ value; as before at the end."""
    modules = parts_of(model).attentions
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    before = {module: _mixes.get(module) for module in modules}
    try:
        config._attn_implementation = EXPLICIT
        _mixes.update(dict.fromkeys(modules, mix))
        yield
    finally:
        config._attn_implementation = implementation
        for module, own in before.items():
            if own is None:
                _mixes.pop(module, None)
            else:
                _mixes[module] = own


def _explicit_attention(
    module: nn.Module,
    query: Float[Tensor, "rows n_heads queries d_head"],
    key: Float[Tensor, "rows n_groups keys d_head"],
    value: Float[Tensor, "rows n_groups keys d_head"],
    attention_mask: Float[Tensor, "_ _ queries keys"] | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "rows queries n_heads d_head"], Tensor]:
    """As the eager attention of transformers, but for the softmax, which is float64 for float64 queries."""
    per_group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(per_group, dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(query.dtype, torch.float32)
    pattern = scores.softmax(-1, dtype=wide).to(query.dtype)  # [rows, n_heads, ctx, ctx]
    return _mixes[module](module, pattern, value).transpose(1, 2).contiguous(), pattern


AttentionInterface.register(EXPLICIT, _explicit_attention)
AttentionMaskInterface.register(EXPLICIT, eager_mask)

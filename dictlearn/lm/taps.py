"""Hooks: read activations at sites, replace them, and run no further than the last site that is needed.

An activation is `[rows, ctx, d]`: the output of the site's module (the first element where it returns a tuple)
or its first input, positional or by keyword. Hooks live as long as their block, also when an error ends it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dictlearn.types import DictlearnError, Site, TokenIds, TokenMask

Tap = Callable[[Tensor], Tensor | None]  # sees an activation; what it returns, if anything, takes its place


class _AllSeen(Exception):
    """Ends a forward whose last site has been read."""


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """Activations by site name, filled by the forwards inside the block; a later forward replaces an earlier one.

    The tensors are the model's own, not copies, in its dtype, with their graph if gradients are enabled. Logits
    are bit-identical to those without. Of an edit of the same site, capture sees what comes before it if the
    block of capture is the outer one, and after it if it is the inner one.
    """
    acts: dict[str, Tensor] = {}
    with _taps(model, {site: _keep(acts, site) for site in sites}):
        yield acts


@contextmanager
def edit(model: nn.Module, edits: Mapping[Site, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace activations in every forward inside the block: `fn(act [rows, ctx, d])` of the same shape and dtype.

    Raises DictlearnError, from the forward, where `fn` returns another shape or dtype.
    """
    with _taps(model, {site: _checked(site, fn) for site, fn in edits.items()}):
        yield


@torch.inference_mode()
def activations(
    model: PreTrainedModel,
    sites: Sequence[Site],
    input_ids: TokenIds,
    attention_mask: TokenMask | None = None,
) -> dict[str, Float[Tensor, "rows ctx _"]]:
    """Activations at `sites` by one forward that stops after the last of them and computes no logits.

    They are inference tensors: copy them into others before anything that needs a gradient.

    Args:
        input_ids: on the model's device.
        attention_mask: False at padding, which comes after a row's tokens; None: all rows are full.

    Raises DictlearnError for a site that never runs, or that has no activation for every token.
    """
    acts: dict[str, Tensor] = {}
    names = {site.name for site in sites}

    def keep_until_last(site: Site) -> Tap:
        keep = _keep(acts, site)

        def tap(act: Tensor) -> None:
            keep(act)
            if acts.keys() == names:
                raise _AllSeen

        return tap

    try:
        with _taps(model, {site: keep_until_last(site) for site in sites}):
            model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    except _AllSeen:
        pass
    if missing := sorted(names - acts.keys()):
        raise DictlearnError(
            f"Sites {', '.join(missing)} were not reached: these modules do not run in a forward of the model up "
            "to its final norm, without logits."
        )
    for name, act in acts.items():
        if act.shape[:2] != input_ids.shape:
            raise DictlearnError(
                f"Site {name!r} must have one activation per token: it gives {list(act.shape)} for token ids "
                f"{list(input_ids.shape)}."
            )
    return {site.name: acts[site.name] for site in sites}


def widths(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, int]:
    """The width d of every site, by a forward of 3 rows of 2 tokens. Raises like `activations`."""
    input_ids = torch.zeros(3, 2, dtype=torch.int64, device=model.device)
    return {name: act.shape[-1] for name, act in activations(model, sites, input_ids).items()}


def _keep(acts: dict[str, Tensor], site: Site) -> Tap:
    def tap(act: Tensor) -> None:
        acts[site.name] = act

    return tap


def _checked(site: Site, fn: Callable[[Tensor], Tensor]) -> Tap:
    def tap(act: Tensor) -> Tensor:
        new = fn(act)
        if (new.shape, new.dtype) != (act.shape, act.dtype):
            raise DictlearnError(
                f"An edit of {site.name!r} must return {list(act.shape)} {act.dtype}, "
                f"got {list(new.shape)} {new.dtype}."
            )
        return new

    return tap


@contextmanager
def _taps(model: nn.Module, taps: Mapping[Site, Tap]) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for site, tap in taps.items():
            hook = _hook_input if site.io == "in" else _hook_output
            handles.append(hook(model.get_submodule(site.module), site, tap))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_input(module: nn.Module, site: Site, tap: Tap) -> RemovableHandle:
    first = next(iter(inspect.signature(module.forward).parameters), "")

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        act = args[0] if args else kwargs.get(first)
        new = tap(_activation(site, act))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, first: new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _hook_output(module: nn.Module, site: Site, tap: Tap) -> RemovableHandle:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = tap(_activation(site, output[0] if is_tuple else output))
        return (new, *output[1:]) if is_tuple and new is not None else new

    return module.register_forward_hook(hook)


def _activation(site: Site, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
        return value
    what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise DictlearnError(f"Site {site.name!r} must have floating-point activations [rows, ctx, d], got {what}.")

"""Hooks: read activations at sites, replace them, and run no further than the last site that is needed.

An activation is `[rows, ctx, d]`: the output of the site's module (the first element where it returns a tuple)
or its first input, positional or by keyword; where a module works on `[rows * ctx, d]` (the MLPs of OPT), it is
shown as `[rows, ctx, d]`. Hooks live as long as their block, also when an error ends it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dictlearn.lm.sites import stream_layer
from dictlearn.types import DictlearnError, Site, TokenIds, TokenMask

Tap = Callable[[Tensor], Tensor | None]  # sees an activation; what it returns, if anything, takes its place
Hook = Callable[[Any], Tensor | None]  # the same for what a module is given or returns, whatever that is


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

    An edit changes what its module reads or returns; of resid_mid, which a module only reads while the stream goes
    on past it, the stream changes as well.

    Raises DictlearnError, from the forward, where `fn` returns another shape or dtype.
    """
    with ExitStack() as stack:
        taps: dict[Site, Tap] = {}
        for site, fn in edits.items():
            replace, layer = _checked(site, fn), stream_layer(site)
            taps[site] = replace
            if layer is not None:
                taps[site] = stack.enter_context(_stream_edit(model.get_submodule(layer), replace))
        stack.enter_context(_taps(model, taps))
        yield


@contextmanager
def _stream_edit(layer: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[Tap]:
    """`replace` for what a module of `layer` reads, which also adds to the layer's output what it changed."""
    change: list[Tensor] = []

    def tap(act: Tensor) -> Tensor:
        new = replace(act)
        change[:] = [new - act]
        return new

    def add(output: Tensor) -> Tensor:
        return output + change.pop()

    handle = _hook_output(layer, add, prepend=True)  # before all who read the layer's output
    try:
        yield tap
    finally:
        handle.remove()


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


def _checked(site: Site, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
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
    grid: list[int] = []  # rows and ctx of the forward that runs
    roots = {model, model.base_model} if isinstance(model, PreTrainedModel) else {model}  # whichever is called
    handles = [_hook_grid(root, grid) for root in roots]
    try:
        for site, tap in taps.items():
            hook = _hook_input if site.io == "in" else _hook_output
            handles.append(hook(model.get_submodule(site.module), _shaped(site, tap, grid)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_grid(model: nn.Module, grid: list[int]) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        grid[:] = next((list(tensor.shape[:2]) for tensor in given if isinstance(tensor, Tensor)), [])

    return model.register_forward_pre_hook(hook, with_kwargs=True)


def _shaped(site: Site, tap: Tap, grid: list[int]) -> Hook:
    """`tap` sees `[rows, ctx, d]`, the module `[rows, ctx, d]` or `[rows * ctx, d]`."""

    def shaped(value: Any) -> Tensor | None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise _no_activation(site, value)
        if value.ndim == 3:
            return tap(value)
        if value.ndim == 2 and grid and len(value) == grid[0] * grid[1]:
            new = tap(value.unflatten(0, grid))
            return None if new is None else new.flatten(0, 1)
        raise _no_activation(site, value)

    return shaped


def _hook_input(module: nn.Module, tap: Hook) -> RemovableHandle:
    first = next(iter(inspect.signature(module.forward).parameters), "")

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        act = args[0] if args else kwargs.get(first)
        new = tap(act)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, first: new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _hook_output(module: nn.Module, tap: Hook, prepend: bool = False) -> RemovableHandle:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = tap(output[0] if is_tuple else output)
        return (new, *output[1:]) if is_tuple and new is not None else new

    return module.register_forward_hook(hook, prepend=prepend)


def _no_activation(site: Site, value: Any) -> DictlearnError:
    what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return DictlearnError(f"Site {site.name!r} must have floating-point activations [rows, ctx, d], got {what}.")

"""A language model on the meta device, run without values: what needs no weights is known before they load.

Models look at values where they make their attention mask and, some, their positions: both are given here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.lm.taps import capture
from dictlearn.types import DictlearnError, Site

T = TypeVar("T")
N_ROWS, CTX = 3, 2
# of a model that looks at values elsewhere, or that takes other arguments
FAILURES = (DictlearnError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Arguments of a forward of 3 rows of 2 tokens, on the model's device."""
    device = model.device
    tokens = torch.zeros(N_ROWS, CTX, dtype=torch.int64, device=device)
    if device.type != "meta":
        return {"input_ids": tokens}
    mask = torch.zeros(N_ROWS, 1, CTX, CTX, dtype=model.dtype, device=device)  # added to attention scores
    positions = torch.arange(CTX, device=device).expand(N_ROWS, CTX)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


def dry(attempt: Callable[[], T]) -> T | None:
    """What `attempt` gives, which runs a model on the meta device; None where that model does not run there."""
    try:
        return attempt()
    except FAILURES:
        return None


@torch.no_grad()
def dry_activations(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Float[Tensor, "rows ctx _"]]:
    """By site name, without values: those that a forward up to the logits, not including them, has."""
    with capture(model, sites) as acts:
        model.base_model(**inputs(model), use_cache=False)
    return acts


def aliases(acts: Mapping[str, Tensor], sites: Iterable[Site]) -> list[tuple[Site, ...]]:
    """Groups of two or more `sites` that are one place, or one tensor among the `dry_activations`.

    A layer's output and the next one's input are one tensor.
    """
    groups: dict[object, list[Site]] = {}
    for site in dict.fromkeys(sites):
        groups.setdefault(_place(site, acts.get(site.name)), []).append(site)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _place(site: Site, act: Tensor | None) -> object:
    if act is None:
        return site.module, site.io
    return act.untyped_storage(), act.storage_offset(), act.shape, act.stride()

"""Attach dictionaries to a language model: its latents as it runs, with the model's outputs unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM, edit, resolve
from dictlearn.types import DictlearnError, Site

POLICIES = ("transparent", "frozen_error", "stop")


class Run:
    """What a model with dictionaries in it computed in its last forward, by dictionary name.

    `latents` dense `[rows, ctx, n_latents]`, `recon` and `errors` `[rows, ctx, d_out]` (target = recon + error).
    With gradients enabled, `latents[name].grad` is filled by a backward pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.latents: dict[str, Float[Tensor, "rows ctx n_latents"]] = {}
        self.recon: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}

    def __call__(self, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        """The model's own forward: `run(input_ids).logits`."""
        return self.model(input_ids, **arguments)


@contextmanager
def attach(
    lm: LM | PreTrainedModel,
    dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary],
    policy: str = "transparent",
    positions: Bool[Tensor, "rows ctx"] | None = None,
) -> Iterator[Run]:
    """Put dictionaries into a model, errors kept: inside the block its logits are bit-identical to the bare ones.

    Policies differ in the gradient alone (Marks et al. 2024 for the first, Kissane et al. 2024 for the second):
        transparent: as in the bare model; each latent also gets the gradient of its own write (total effects).
        frozen_error: the error is a constant, gradients pass the site only through the latents.
        stop: no gradient passes the site; latents get the gradient of their own write.

    Args:
        lm: a loaded LM, or the Hugging Face model itself.
        dictionaries: one, several, or by name; unnamed ones are named by their write site.
        positions: where the dictionaries are put in; elsewhere the gradient is the bare model's. None: everywhere.

    Raises DictlearnError for an unknown policy, an unknown site, or two dictionaries that write the same site.
    """
    if policy not in POLICIES:
        raise DictlearnError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    model = lm.model if isinstance(lm, LM) else lm
    run = Run(model)
    named = _named(dictionaries)
    read: dict[str, Tensor] = {}
    edits: dict[Site, Callable[[Tensor], Tensor]] = {}
    writers = {d.writes[0]: (name, d) for name, d in named.items()}
    for site in dict.fromkeys(s for d in named.values() for s in (*d.reads, *d.writes)):
        edits[resolve(model, site)] = _site_edit(run, site, writers.get(site), read, policy, positions)
    with edit(model, edits):
        yield run


def _named(dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary]) -> dict[str, Dictionary]:
    listed = [dictionaries] if isinstance(dictionaries, Dictionary) else dictionaries
    named = list(listed.items() if isinstance(listed, Mapping) else ((d.writes[0], d) for d in listed))
    written = [site for _, dictionary in named for site in dictionary.writes]
    if len(set(written)) < len(written):
        raise DictlearnError(f"Each write site takes one dictionary, got writes {written}.")
    if several := [name for name, dictionary in named if dictionary.site_axis]:
        raise DictlearnError(f"Only dictionaries of one read and one write site attach, got {several}.")
    return dict(named)


def _site_edit(
    run: Run,
    site: str,
    writer: tuple[str, Dictionary] | None,
    read: dict[str, Tensor],
    policy: str,
    positions: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """What happens to the activation at one site: remembered for readers, then written by its dictionary."""

    def at_site(act: Tensor) -> Tensor:
        read[site] = act
        if writer is None:
            return act
        name, dictionary = writer
        if dictionary.reads[0] not in read:
            raise DictlearnError(f"{name} writes {site} before the model reaches its read {dictionary.reads[0]}.")
        return _splice(run, name, dictionary, read[dictionary.reads[0]], act, policy, positions)

    return at_site


def _splice(
    run: Run, name: str, dictionary: Dictionary, x: Tensor, act: Tensor, policy: str, positions: Tensor | None
) -> Tensor:
    """`act`, exactly, with the gradient of the policy."""
    x = x if policy == "frozen_error" else x.detach()
    latents = dictionary.encode(x)  # [rows, ctx, n_latents]
    if torch.is_grad_enabled():
        if policy != "frozen_error" or not latents.requires_grad:
            latents = latents.detach().requires_grad_()
        latents.retain_grad()
    recon = dictionary.decode(latents, x)
    run.latents[name], run.recon[name] = latents, recon.detach()
    run.errors[name] = act.detach().to(recon.dtype) - recon.detach()
    base = act if policy == "transparent" else act.detach()
    spliced = base + (recon - recon.detach()).to(act.dtype)  # the bracket is exactly zero
    return spliced if positions is None else torch.where(positions.unsqueeze(-1), spliced, act)

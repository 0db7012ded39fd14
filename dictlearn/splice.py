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
from dictlearn.lm import LM, edit, model_of, name_of, resolve
from dictlearn.types import DictlearnError, Site

POLICIES = ("transparent", "frozen_error", "stop")


class Run:
    """What a model with dictionaries in it computed in its last forward, by dictionary name.

    `latents` dense `[rows, ctx, n_latents]`, `recon` and `errors` `[rows, ctx, d_out]` (target = recon + error), of
    several sites `[rows, ctx, n_writes, d_out]`. With gradients enabled, `latents[name].grad` is filled by a
    backward pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.latents: dict[str, Float[Tensor, "rows ctx n_latents"]] = {}
        self.recon: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}
        self._several: list[_Several] = []
        self._without = False  # those of several sites, in the forward that runs

    def __call__(self, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        """The model's own forward: `run(input_ids).logits`.

        With a dictionary of several sites the model runs twice: latents that a site needs may depend on later ones.
        Raises DictlearnError for past_key_values there.
        """
        if not self._several:
            return self.model(input_ids, **arguments)
        if arguments.get("past_key_values") is not None:
            raise DictlearnError("With a dictionary of several sites the model runs twice: no past_key_values.")
        try:
            self._without = True
            with torch.no_grad():
                self.model(input_ids, **arguments)
            self._without = False
            for one in self._several:
                one.begin()
            return self.model(input_ids, **arguments)
        finally:
            self._without = False
            for one in self._several:
                one.end()


@contextmanager
def attach(
    lm: LM | PreTrainedModel,
    dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary],
    policy: str = "transparent",
    positions: Bool[Tensor, "rows ctx"] | None = None,
) -> Iterator[Run]:
    """Put dictionaries into a model, errors kept: inside the block its logits are bit-identical to the bare ones.

    Latents are changed by `dictlearn.intervene`. Policies differ in the gradient alone (Marks et al. 2024 for the
    first, Kissane et al. 2024 for the second):
        transparent: as in the bare model; each latent also gets the gradient of its own write (total effects).
        frozen_error: the error is a constant, gradients pass the site only through the latents.
        stop: no gradient passes the site; latents get the gradient of their own write.

    Args:
        lm: a loaded LM, or the Hugging Face model itself.
        dictionaries: one, several, or by name; unnamed ones are named by their write site, of several like
            `resid_post.0-3`.
        positions: where the dictionaries are put in; elsewhere the gradient is the bare model's. None: everywhere.

    Raises DictlearnError for an unknown policy, an unknown site, or two dictionaries that write the same site.
    """
    if policy not in POLICIES:
        raise DictlearnError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    model = model_of(lm)
    run = Run(model)
    named = by_name(dictionaries)
    read: dict[str, Tensor] = {}
    edits: dict[Site, Callable[[Tensor], Tensor]] = {}
    several = {name: _Several(run, name, d, policy, positions) for name, d in named.items() if d.site_axis}
    run._several = list(several.values())
    writers = {d.writes[0]: (name, d) for name, d in named.items() if not d.site_axis}
    for site in dict.fromkeys(s for d in named.values() for s in (*d.reads, *d.writes)):
        at_site = _site_edit(run, site, writers.get(site), read, policy, positions)
        of_several = [one for one in run._several if site in (*one.dictionary.reads, *one.dictionary.writes)]
        edits[resolve(model, site)] = _in_turn(site, of_several, at_site)
    with edit(model, edits):
        yield run


def by_name(dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary]) -> dict[str, Dictionary]:
    """Unnamed ones by their write sites. Raises DictlearnError for two dictionaries that write the same site."""
    listed = [dictionaries] if isinstance(dictionaries, Dictionary) else dictionaries
    named = list(listed.items() if isinstance(listed, Mapping) else ((_name(d), d) for d in listed))
    written = [site for _, dictionary in named for site in dictionary.writes]
    if len(set(written)) < len(written):
        raise DictlearnError(f"Each write site takes one dictionary, got writes {written}.")
    return dict(named)


def _name(dictionary: Dictionary) -> str:
    """Its write site; of several the name that a run gives it, `resid_post.0-3`."""
    return dictionary.writes[0] if len(dictionary.writes) == 1 else name_of(dictionary.writes)


def _in_turn(
    site: str, of_several: list[_Several], at_site: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """First those who read the activation as the model has it, then the one that writes."""

    def in_turn(act: Tensor) -> Tensor:
        for one in of_several:
            one.reads(site, act)
        act = at_site(act)
        for one in of_several:
            act = one.writes(site, act)
        return act

    return in_turn


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
    return _put_in(act, recon, policy, positions)


def _put_in(act: Tensor, recon: Tensor, policy: str, positions: Tensor | None) -> Tensor:
    """`act`, exactly, with the gradient of the policy through `recon`."""
    base = act if policy == "transparent" else act.detach()
    spliced = base + (recon - recon.detach()).to(act.dtype)  # the bracket is exactly zero
    return spliced if positions is None else torch.where(positions.unsqueeze(-1), spliced, act)


class _Several:
    """A dictionary of several sites in a model, which runs twice: without it, for its latents, and with it.

    Latents are a leaf of the graph with the values of the first forward. Under frozen_error the second one adds
    what is zero and has the gradient to the reads, as far as the model has come: a dictionary whose layers have
    latents of their own needs no more; any other one must have all its reads before its first write.
    """

    def __init__(self, run: Run, name: str, dictionary: Dictionary, policy: str, positions: Tensor | None) -> None:
        self.run, self.name, self.dictionary = run, name, dictionary
        self.policy, self.positions = policy, positions
        self.end()

    def end(self) -> None:
        """After the forward with it, or a failed one."""
        self.read: dict[str, Tensor] = {}
        self.x: Tensor | None = None
        self.recon: Tensor | None = None

    def begin(self) -> None:
        """Between the forward without it and the one with it."""
        self.x = self.dictionary.select_reads(self.read).detach()
        latents = self.dictionary.encode(self.x).detach()
        if torch.is_grad_enabled():
            latents.requires_grad_()
        recon = self.dictionary.decode(latents, self.x)
        if self.policy != "frozen_error" or not torch.is_grad_enabled():
            self.recon = recon
        self.read = {}
        self.run.latents[self.name], self.run.recon[self.name] = latents, recon.detach()
        self.run.errors[self.name] = torch.zeros_like(recon)

    def reads(self, site: str, act: Tensor) -> None:
        """The model has come to a site, or to a read of it."""
        if site in self.dictionary.reads:
            self.read[site] = act

    def writes(self, site: str, act: Tensor) -> Tensor:
        """`act`, exactly, with the gradient of the policy where the dictionary writes."""
        if site not in self.dictionary.writes or self.run._without:
            return act
        if self.x is None:
            raise DictlearnError(f"{self.name} has several sites: call run(...) instead of the model itself.")
        place = self.dictionary.writes.index(site)
        recon = (self._live(place, self.x) if self.recon is None else self.recon)[..., place, :]
        self.run.errors[self.name][..., place, :] = act.detach().to(recon.dtype) - recon.detach()
        return _put_in(act, recon, self.policy, self.positions)

    def _live(self, place: int, clean: Tensor) -> Tensor:
        """The reconstruction with its gradient to what the model has read, for the write site at `place`."""
        d = self.dictionary
        needed = d.reads[: place + 1] if d.layered else d.reads
        if missing := [site for site in needed if site not in self.read]:
            raise DictlearnError(
                f"{self.name} writes {d.writes[place]} before the model reaches its read {missing[0]}: "
                "policy=frozen_error cannot be had, use transparent or stop."
            )
        x = d.select_reads(dict(zip(d.reads, clean.unbind(-2), strict=True)) | self.read)
        latents = d.encode(x)
        return d.decode(self.run.latents[self.name] + (latents - latents.detach()), x)

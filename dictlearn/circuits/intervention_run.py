"""A model that runs with interventions, those of interventions.py, on the latents of its dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dictlearn.checks import check_choice
from dictlearn.circuits.cuts import Cut, cuts_of
from dictlearn.circuits.dictionary_maps import decoder_rows, layers_of_latents, skipped, token_norm
from dictlearn.circuits.freeze import Frozen, held, recorded
from dictlearn.circuits.interventions import Intervention, mask_at
from dictlearn.circuits.parts import n_layers, parts_of
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries._input_norm import undone
from dictlearn.lm import LM, edit, resolve
from dictlearn.splice import by_name
from dictlearn.types import DictlearnError, Site

ERRORS = ("recomputed", "frozen")
FREEZES = ("none", "attention", "direct")

Interventions: TypeAlias = Intervention | Sequence[Intervention]
Place: TypeAlias = tuple[str, str]  # module path and side of a site, whatever its name
Acts: TypeAlias = dict[Place, Tensor]  # each [rows, ctx, d]


class InterventionRun:
    """What a model with interventions computed in its last forward.

    `latents`: by dictionary name, dense `[rows, ctx, n_latents]`, interventions included.
    `clean`: the model's output in the clean run; None where there is none.
    """

    def __init__(self, model: PreTrainedModel, attached: Sequence[_Attached], error: str, freeze: str) -> None:
        self.model = model
        self.clean: Any = None
        self._attached, self._error, self._freeze = attached, error, freeze
        self._in_clean_run = False
        self._clean: Acts | None = None
        self._read: Acts = {}
        self._mlps: list[Site] = []  # what is held under freeze=direct: what MLPs multiply with their last matrix
        if freeze == "direct":
            self._mlps = [resolve(model, f"mlp_hidden.{layer}") for layer in range(n_layers(model))]

    @property
    def latents(self) -> dict[str, Float[Tensor, "rows ctx n_latents"]]:
        return {one.cut.name: one.latents for one in self._attached if one.latents is not None}

    @property
    def _runs_twice(self) -> bool:
        return self._freeze != "none" or self._error == "frozen"

    def __call__(self, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        """The model's own forward: `run(input_ids).logits`.

        With `error="frozen"` or a `freeze` there are two, the first of them the clean run, without gradient. Raises
        DictlearnError for past_key_values there.
        """
        if not self._runs_twice:
            return self.model(input_ids, **arguments)
        if arguments.get("past_key_values") is not None:
            raise DictlearnError(f"With {self._settings} the model runs twice: no past_key_values.")
        arguments |= {"use_cache": False}
        try:
            self._clean, self._in_clean_run = {}, True
            with torch.no_grad(), self._recording() as frozen:
                self.clean = self.model(input_ids, **arguments)
            self._in_clean_run = False
            for one in self._attached:
                one.keep_clean(self._clean)
            with nullcontext() if frozen is None else held(self.model, frozen):
                return self.model(input_ids, **arguments)
        finally:
            self._clean, self._in_clean_run = None, False

    @property
    def _settings(self) -> str:
        return f"error={self._error} and freeze={self._freeze}"

    def _recording(self) -> AbstractContextManager[Frozen | None]:
        return nullcontext() if self._freeze == "none" else recorded(self.model, norms=self._freeze == "direct")

    def begin(self, _: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Before every forward of the model."""
        if self._runs_twice and self._clean is None:
            raise DictlearnError(
                f"{self._settings} need the clean run of the same input: call run(...) instead of the model "
                "itself. model.generate(...) is for error=recomputed with freeze=none."
            )
        cache = arguments.get("past_key_values")
        self._read = {}
        for one in self._attached:
            one.begin(0 if cache is None else int(cache.get_seq_length()))

    def edits(self) -> dict[Site, Callable[[Tensor], Tensor]]:
        """What happens where dictionaries read and write, and where MLPs are held."""
        sites = [*self._mlps, *(site for one in self._attached for site in one.cut.sites.values())]
        return {site: self._at(place) for place, site in {_place(site): site for site in sites}.items()}

    def _at(self, place: Place) -> Callable[[Tensor], Tensor]:
        is_held = place in map(_place, self._mlps)
        writer = next((one for one in self._attached if place in one.writes), None)

        def at_site(act: Tensor) -> Tensor:
            if self._in_clean_run:
                assert self._clean is not None
                self._clean[place] = act.detach()
                return act
            if is_held:
                assert self._clean is not None
                act = self._clean[place]
            self._read[place] = act
            if writer is not None:
                self._read[place] = writer.write(writer.writes.index(place), act, self._read)
            return self._read[place]

        return at_site


class _Attached:
    """A dictionary in the model that runs, and what is done to its latents."""

    def __init__(self, cut: Cut, interventions: Sequence[Intervention], error: str, freeze: str) -> None:
        d = cut.dictionary
        self.cut, self.interventions = cut, interventions
        self.is_frozen, self.is_direct = error == "frozen", freeze == "direct"
        self.reads, self.writes = [_place(site) for site in cut.reads], [_place(site) for site in cut.writes]
        named = [one.indices for one in interventions]
        touched = sorted({latent for own in named for latent in own})
        self.touched = torch.tensor(touched, dtype=torch.int64, device=d.b_dec.device)
        self.columns = [torch.searchsorted(self.touched, self.touched.new_tensor(own)) for own in named]
        self.rows = [decoder_rows(d, self.touched, write) for write in range(len(self.writes))]
        self.layers = set(layers_of_latents(d, self.touched).tolist())
        self.latents: Tensor | None = None
        self.begin(0)

    def begin(self, n_cached: int) -> None:
        """Before every forward, with the number of tokens in its cache."""
        self.n_cached = n_cached
        self.is_changed = False
        self.change: Float[Tensor, "rows ctx n_touched"] | None = None  # times what an input norm took off

    def keep_clean(self, acts: Acts) -> None:
        """Between the clean run and the one with interventions."""
        d = self.cut.dictionary
        if not (self.is_frozen or self.is_direct):
            return
        self.clean = [acts[place] for place in self.writes]
        self.clean_x = self._x(len(self.writes) - 1, acts, self.clean[0])
        self.clean_latents = d.encode(self.clean_x).detach()
        if not self.is_direct:
            self.clean_recon = self._recon(self.clean_latents, self.clean_x)

    def write(
        self, number: int, act: Float[Tensor, "rows ctx d_out"], read: Acts
    ) -> Float[Tensor, "rows ctx d_out"]:
        """The activation at the write site `number`, from the model's own and what has been read."""
        x = self._x(number, read, act)
        if self._has_news(number):
            self._change(x)
        act = self.clean[number] if self.is_frozen else act
        for added in self._additions(number, x):
            act = act + added.to(act.dtype)
        return act

    def _additions(self, number: int, x: Tensor) -> Iterator[Float[Tensor, "rows ctx d_out"]]:
        """What comes to the activation at the write site `number`."""
        if self.is_frozen and not self.is_direct:
            assert self.latents is not None
            yield (self._recon(self.latents, x) - self.clean_recon)[..., number, :]
            return
        if self.change is not None:
            rows = self.rows[number]
            yield self.change.to(rows.dtype) @ rows
        if self.is_frozen:
            yield from self._skip_changes(number, x)

    def _x(self, number: int, read: Acts, like: Float[Tensor, "rows ctx _"]) -> Tensor:
        """What the dictionary reads, at its write site `number`; of layers that write nothing so far zeros."""
        d = self.cut.dictionary
        needed = self.cut.reads[: number + 1] if d.layered else self.cut.reads
        if missing := [site.name for site in needed if _place(site) not in read]:
            site = self.cut.writes[number].name
            raise DictlearnError(f"{self.cut.name} writes {site} before the model reaches its read {missing[0]}.")
        unread = torch.zeros_like(like[..., :1]).expand(*like.shape[:-1], d.d_in)
        found = {site.name: read.get(_place(site), unread) for site in self.cut.reads}
        return d.select_reads(found)

    def _has_news(self, number: int) -> bool:
        """Whether latents that matter at a write site are not those of the one before."""
        if self.is_direct:
            return not self.is_changed
        return self.is_frozen or number in self.layers or number == len(self.writes) - 1

    def _change(self, x: Tensor) -> None:
        """Latents of what has been read, and the interventions."""
        x, before = (self.clean_x, self.clean_latents) if self.is_direct else (x, self.cut.dictionary.encode(x))
        self.is_changed = True
        self.latents = before
        if not len(self.touched):
            return
        own = before.index_select(-1, self.touched)  # [rows, ctx, n_touched]
        after = own
        for one, columns in zip(self.interventions, self.columns, strict=True):
            at = mask_at(one.positions, len(own), self.n_cached, own.shape[1], own.device).unsqueeze(-1)
            values = after[..., columns]
            changed = torch.where(at, one(values), values)
            after = after.index_copy(-1, columns, changed)
        self.latents = before.index_copy(-1, self.touched, after)
        self.change = after - own
        if undone(self.cut.dictionary.input_norm):
            self.change = self.change * token_norm(self.cut.dictionary, x).factor

    def _recon(self, latents: Tensor, x: Tensor) -> Float[Tensor, "rows ctx n_writes d_out"]:
        recon = self.cut.dictionary.decode(latents, x)
        return recon if self.cut.dictionary.site_axis else recon.unsqueeze(-2)

    def _skip_changes(self, number: int, x: Tensor) -> Iterator[Float[Tensor, "rows ctx d_out"]]:
        """What the skip path from each read writes more than in the clean run, whose divisors input norms keep."""
        d = self.cut.dictionary
        now, clean = (part.to(d.b_dec.dtype) for part in (x, self.clean_x))
        reads = zip(now.unbind(-2), clean.unbind(-2), strict=True) if d.site_axis else [(now, clean)]
        for read, (one, before) in enumerate(reads):
            norm = token_norm(d, before)
            if (written := skipped(d, one - before, norm.divisor, read, number)) is not None:
                yield written * norm.factor


@contextmanager
def intervene(
    lm: LM | PreTrainedModel,
    dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary],
    interventions: Interventions | Mapping[str, Interventions],
    error: str = "recomputed",
    freeze: str = "none",
) -> Iterator[InterventionRun]:
    """Inside the block the model has other values of some latents; where nothing changes, it is bit-identical.

    Latents are computed on the model as it runs, after earlier interventions, and those on one dictionary act in
    turn. The error, which is what a dictionary leaves over of an activation, stays:

        recomputed: as it is on the model that runs. What changed latents write is added to each write site, and
            nothing else changes there.
        frozen: as it was in the clean run of the same input. Each write site of all `dictionaries` gets
            decode(latents, x) + error: influence of earlier changes passes it through latents (and a skip path)
            alone, as in a local replacement model (Ameisen et al. 2025).

    The two are the same where nothing changes before. `freeze` holds more at its values of the clean run:

        none: nothing.
        attention: the attention patterns.
        direct: patterns, denominators of norms, what MLPs compute, and latents before interventions. Effects are
            direct ones, through the residual stream, values of attention and (error=frozen) skip paths. They are
            linear in the changes of latents, but for a softcap on the logits.

    The clean run is the first of two forwards in `run(...)`; with a `freeze` it is the bare model up to rounding,
    and bit-identical to the second where nothing changes. With error=recomputed and freeze=none there is none: the
    model itself can be called as well, and its `generate`, with or without cache.

    Args:
        lm: a loaded LM, or the Hugging Face model itself.
        dictionaries: as for `attach`; those without interventions are watched, in `run.latents`.
        interventions: by name of the dictionary; if there is only one, without.

    Raises DictlearnError for unknown names, latents and settings, two dictionaries that write the same site, a
    crosscoder of several sites; with a `freeze`, in training mode and for a family that is not known.
    """
    check_choice("error", error, ERRORS)
    check_choice("freeze", freeze, FREEZES)
    model = lm.model if isinstance(lm, LM) else lm
    if freeze != "none":
        parts_of(model)
    cuts = cuts_of(model, by_name(dictionaries))
    wanted = _by_dictionary(cuts, interventions)
    run = InterventionRun(model, [_Attached(cut, wanted[cut.name], error, freeze) for cut in cuts], error, freeze)
    handle = model.base_model.register_forward_pre_hook(run.begin, with_kwargs=True)
    try:
        with edit(model, run.edits()):
            yield run
    finally:
        handle.remove()


def _by_dictionary(
    cuts: Sequence[Cut],
    interventions: Interventions | Mapping[str, Interventions],
) -> dict[str, list[Intervention]]:
    """The interventions on each dictionary. Raises DictlearnError where one does not have them."""
    names = [cut.name for cut in cuts]
    if not isinstance(interventions, Mapping):
        if len(names) > 1:
            raise DictlearnError(
                f"Of several dictionaries interventions are given by name, as in {{{names[0]!r}: ...}}; there are "
                f"{', '.join(names)}."
            )
        interventions = {names[0]: interventions}
    if unknown := [name for name in interventions if name not in names]:
        raise DictlearnError(f"No dictionary is called {', '.join(unknown)}; there are {', '.join(names)}.")
    found: dict[str, list[Intervention]] = {name: [] for name in names}
    for name, given in interventions.items():
        found[name] = [given] if isinstance(given, Intervention) else list(given)
    for cut in cuts:
        n = cut.dictionary.n_latents
        for one in found[cut.name]:
            if bad := [str(latent) for latent in one.indices if latent >= n]:
                raise DictlearnError(f"{cut.name} has the latents 0 to {n - 1}, got {', '.join(bad)}.")
    return found


def _place(site: Site) -> Place:
    return site.module, site.io

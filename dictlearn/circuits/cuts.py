"""Where dictionaries cut a model: the activations at their write sites as a sum over nodes.

    activation = sum over latents of value_i * row_i + skip + rest

`value_i` is the latent, times what an input norm took off its token, so that the sum is linear in the values;
`rest` is what the error node stands for: bias and error. What a skip path writes is no node: it is always computed,
on what the dictionary reads as the model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.checks import check_choice
from dictlearn.circuits.parts import n_layers
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries._input_norm import normed, undone
from dictlearn.lm import LM, model_of, resolve
from dictlearn.lm.sites import FAMILIES
from dictlearn.lm.taps import capture
from dictlearn.splice import by_name
from dictlearn.types import DictlearnError, Latents, Site, SparseLatents, TokenIds

Acts = Mapping[str, Tensor]  # [n, ctx, d] by site name
POSITIONS = ("each", "all")


class Cut:
    """One dictionary in a model."""

    def __init__(self, model: PreTrainedModel, name: str, dictionary: Dictionary) -> None:
        self.name, self.dictionary = name, dictionary
        self.reads = [resolve(model, site) for site in dictionary.reads]
        self.writes = [resolve(model, site) for site in dictionary.writes]

    @property
    def sites(self) -> dict[str, Site]:
        return {site.name: site for site in (*self.reads, *self.writes)}

    def targets(self, acts: Acts) -> Float[Tensor, "*tokens n_writes d_out"]:
        """The activations at the write sites."""
        return torch.stack([acts[site.name] for site in self.writes], dim=-2).to(self.dictionary.b_dec.dtype)

    def values(self, acts: Acts) -> SparseLatents:
        """Values of the active latents of all tokens `[n * ctx]`."""
        x = self.dictionary.select_reads(acts).flatten(0, 1)
        latents = self.dictionary.encode_sparse(x)
        if not undone(self.dictionary.input_norm):
            return latents
        factor = self._factor(x).squeeze(-1).repeat_interleave(latents.offsets.diff())
        return latents._replace(values=latents.values * factor)

    def dense_values(self, x: Tensor) -> Float[Tensor, "*tokens n_latents"]:
        """The same of every latent, from raw reads."""
        latents = self.dictionary.encode(x)
        return latents * self._factor(x) if undone(self.dictionary.input_norm) else latents

    def _factor(self, x: Tensor) -> Float[Tensor, "*tokens 1"]:
        return normed(self.dictionary.input_norm, x.to(self.dictionary.b_dec.dtype)).factor

    def written(self, values: Latents) -> Float[Tensor, "*tokens n_writes d_out"]:
        """What latents of these values write; linear."""
        d = self.dictionary
        flat = d.decode_flat(values) - d.b_dec.flatten()
        return flat.unflatten(-1, (len(self.writes), d.d_out)) / d.write_scale.unsqueeze(-1)

    def bias(self, x: Tensor) -> Float[Tensor, "*tokens n_writes d_out"]:
        """What the dictionary writes without latents and skip path, from raw reads."""
        d = self.dictionary
        tokens = x.shape[: -2 if d.site_axis else -1]
        bias = d.denormalise(d.b_dec.flatten().expand(*tokens, -1), x)
        return bias if d.site_axis else bias.unsqueeze(-2)

    def skipped(self, x: Tensor) -> Float[Tensor, "*tokens n_writes d_out"]:
        """What the skip path writes, from raw reads; zeros where there is none."""
        d = self.dictionary
        tokens = x.shape[: -2 if d.site_axis else -1]
        if d.W_skip is None:
            return d.b_dec.new_zeros(()).expand(*tokens, len(self.writes), d.d_out)
        skipped = d._skip(d.normalise(x)).reshape(*tokens, len(self.writes), d.d_out) / d.write_scale.unsqueeze(-1)
        return skipped * self._factor(x).unsqueeze(-1) if undone(d.input_norm) else skipped

    def rests(self, acts: Acts, written: Float[Tensor, "*tokens n_writes d_out"]) -> Tensor:
        """What the error nodes stand for, where latents write `written`."""
        rests = self.targets(acts) - written
        return rests if self.dictionary.W_skip is None else rests - self.skipped(self.dictionary.select_reads(acts))

    def written_along(
        self, values: SparseLatents, gradient: Float[Tensor, "n_tokens n_writes d_out"]
    ) -> tuple[Float[Tensor, "n_tokens n_writes d_out"], Float[Tensor, " nnz"]]:
        """What latents of these values write, and each value times the gradient along what it writes."""
        with torch.enable_grad():
            leaf = values.values.detach().requires_grad_()
            written = self.written(values._replace(values=leaf))
            (along,) = torch.autograd.grad(written, leaf, gradient.to(written.dtype))
        return written.detach(), along * values.values


def cuts_of(
    model: LM | PreTrainedModel, dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary]
) -> list[Cut]:
    """Dictionaries in a model, by name; those without one by their write sites.

    Raises DictlearnError for none, for two that write one activation, and for several write sites whose latents
    need all reads (a crosscoder of several layers). A read after its write shows when the model runs.
    """
    if not dictionaries:
        raise DictlearnError("A circuit needs at least one dictionary, got none.")
    own = model_of(model)
    named = dictionaries if isinstance(dictionaries, Mapping) else by_name(dictionaries)
    cuts = [Cut(own, name, dictionary) for name, dictionary in named.items()]
    before = _layers_before(own)
    owners: dict[tuple[str, str], tuple[str, str]] = {}
    for cut in cuts:
        for site in cut.writes:
            place = before.get(site[1:], site[1:])
            if place in owners:
                other, name = owners[place]
                also = f"{site.name}, the same activation as {name}" if site.name != name else name
                raise DictlearnError(f"Each write site takes one dictionary: {other} and {cut.name} write {also}.")
            owners[place] = cut.name, site.name
        if len(cut.writes) > 1 and not cut.dictionary.layered:
            raise DictlearnError(
                f"{cut.name} writes {len(cut.writes)} sites with latents that need all of its reads: circuits are "
                "for dictionaries of one write site, and for cross-layer transcoders."
            )
    return cuts


def sets_of(model: PreTrainedModel, dictionaries: Mapping[str, Dictionary]) -> list[dict[str, Dictionary]]:
    """All dictionaries together, or each alone where two write the same activation, by whatever names."""
    before = _layers_before(model)
    sites = [resolve(model, site) for d in dictionaries.values() for site in d.writes]
    if len({before.get(site[1:], site[1:]) for site in sites}) == len(sites):
        return [dict(dictionaries)]
    return [{name: d} for name, d in dictionaries.items()]


def check_cuts(cuts: Sequence[Any]) -> None:
    """Raises DictlearnError for dictionaries that are in no model yet."""
    if wrong := next((cut for cut in cuts if not isinstance(cut, Cut)), None):
        raise DictlearnError(f"Cuts are what cuts_of(model, dictionaries) returns, got {type(wrong).__name__}.")


def _layers_before(model: PreTrainedModel) -> dict[tuple[str, str], tuple[str, str]]:
    """Where what a layer reads comes from, of families that are known: the layer before returned it."""
    if model.config.get_text_config().model_type not in FAMILIES:
        return {}
    pre, post = (
        [resolve(model, f"{kind}.{i}") for i in range(n_layers(model))] for kind in ("resid_pre", "resid_post")
    )
    return {(b.module, b.io): (a.module, a.io) for a, b in zip(post[:-1], pre[1:], strict=True)}


def sites_of(cuts: Sequence[Cut]) -> dict[str, Site]:
    """Every read and write site, by name."""
    return {name: site for cut in cuts for name, site in cut.sites.items()}


def labels(ctx: int, positions: str, n_special: int, device: torch.device) -> Int[Tensor, " ctx"]:
    """The place of each position among those of `NodeValues`; -1 at special tokens, which have no nodes.

    Raises DictlearnError unless `positions` is "each" or "all".
    """
    check_choice("positions", positions, POSITIONS)
    found = (
        torch.arange(ctx, device=device)
        if positions == "each"
        else torch.zeros(ctx, dtype=torch.int64, device=device)
    )
    found[:n_special] = -1
    return found


def n_positions(ctx: int, positions: str) -> int:
    """How many positions the nodes have."""
    return ctx if positions == "each" else 1


@torch.no_grad()
def record(model: PreTrainedModel, cuts: Sequence[Cut], ids: TokenIds) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits `[n, vocab]` after the last tokens, and the activations at all sites, without gradient."""
    with capture(model, list(sites_of(cuts).values())) as acts:
        logits = last_logits(model, ids)
    return logits, dict(acts)


def last_logits(model: PreTrainedModel, ids: TokenIds) -> Float[Tensor, "n vocab"]:
    """The logits after the last tokens; others are not computed, where the model can leave them out."""
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=False, **fewer).logits[:, -1]


def embeddings(model: PreTrainedModel) -> Site:
    """The output of the token embedding."""
    module = model.get_input_embeddings()
    path = next(path for path, own in model.named_modules() if own is module)
    return Site(path, path, "out")

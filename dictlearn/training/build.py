"""From a checked configuration to dictionaries in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from dictlearn.choices import is_count
from dictlearn.config import ConfigError, build
from dictlearn.data import SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.hub import load
from dictlearn.lm import LM, reached, widths
from dictlearn.training.learner import Learner, prepare
from dictlearn.training.module import Member
from dictlearn.training.points import Entry, sites_of
from dictlearn.training.subspace import Size, subspace_sizes
from dictlearn.training.terms import lm_terms
from dictlearn.types import Site

MOST_DEAD_AFTER = 10_000_000  # tokens


def dead_after(dead_after_tokens: int | None, n_tokens: int) -> int:
    """Tokens of silence after which a latent counts as dead."""
    return max(1, min(MOST_DEAD_AFTER, n_tokens // 10)) if dead_after_tokens is None else dead_after_tokens


def build_members(
    cfg: DictConfig,
    found: Sequence[Entry],
    lm: LM,
    statistics: Mapping[str, SiteStatistics],
    starts: Mapping[str, Dictionary],
) -> list[Member]:
    """Initialised dictionaries with their objectives; weights depend on the seed and the base name alone.

    Those named in `starts` start from that dictionary.
    """
    width = widths(lm.model, sites_of(found))
    members = []
    for entry in found:
        dictionary = build_dictionary(entry, width[entry.read.name], width[entry.write.name])
        generator = torch.Generator().manual_seed(_seed(cfg.seed, entry.base))
        start, sizes = starts.get(entry.name), sizes_of(entry, lm.model)
        variance = prepare(dictionary, statistics, entry.config.normalise, generator, start, sizes)
        optimizer, terms = build(entry.config.optimizer), build(entry.config.objective)
        for term in lm_terms(terms).values():
            later = reached(lm.model, [entry.write], term.sites(lm.model))
            term.bind([entry.write], {site: statistics[site.name].variance for site in later})
        dead_after_tokens = dead_after(entry.config.dead_after_tokens, cfg.n_tokens)
        learner = Learner(
            entry.name,
            dictionary,
            terms,
            variance,
            dead_after_tokens,
            optimizer.clip_norm,
            cfg.micro_batch_size,
        )
        members.append(Member(learner, optimizer, build(entry.config.schedule)))
    return members


def captured_sites(found: Sequence[Entry], model: PreTrainedModel) -> list[Site]:
    """Every site whose activations a run needs, once: those of the dictionaries, and what their terms look at."""
    later = [
        site
        for entry in found
        for term in lm_terms(build(entry.config.objective)).values()
        for site in reached(model, [entry.write], term.sites(model))
    ]
    return list(dict.fromkeys([*sites_of(found), *later]))


def sizes_of(entry: Entry, model: PreTrainedModel) -> dict[str, Size]:
    """Of the subspaces that the entry's random directions are drawn in, by read site."""
    return subspace_sizes(entry.config.init_subspace, [entry.read], model)


def starting_dictionaries(init_from: Any, found: Sequence[Entry]) -> dict[str, Dictionary]:
    """For each entry, by name, the dictionary of `init_from` to start from: a single one, or the one of its name.

    Raises ConfigError where one is missing; empty without `init_from`.
    """
    if init_from is None:
        return {}
    if not isinstance(init_from, str):
        raise ConfigError([f"init_from must be a dictionary or run folder, got {init_from!r}"])
    loaded = load(init_from)
    if isinstance(loaded, Dictionary):
        return {entry.name: loaded for entry in found}
    starts, problems = {}, []
    for entry in found:
        start = loaded.get(entry.name) or loaded.get(entry.base)
        if start is None:
            problems.append(
                f"init_from={init_from} has no dictionary {entry.name!r}; it has {', '.join(loaded)}: train at the "
                "same sites (experiment=single site=... or sites=...), or give the folder of one dictionary"
            )
        else:
            starts[entry.name] = start
    if problems:
        raise ConfigError(problems)
    return starts


def build_dictionary(entry: Entry, d_in: int, d_out: int, device: str = "cpu") -> Dictionary:
    """The dictionary of an entry, with empty weights."""
    if entry.config.normalise == "layer_norm" and entry.read.name != entry.write.name:
        raise ConfigError(
            [
                "normalise=layer_norm needs a dictionary that reads and writes one site, not "
                f"{entry.read.name} and {entry.write.name}: use mean_norm or none there, which "
                "dictionaries.NAME.set={normalise:mean_norm} does for one dictionary alone"
            ]
        )
    if is_count(dimensions := entry.config.init_subspace, d_in + 1):
        name = entry.read.name
        raise ConfigError([f"init_subspace must be at most the width of {name}, {d_in}, got {dimensions}"])
    with torch.device(device):
        return build(entry.config.module)(
            d_in=d_in,
            d_out=d_out,
            n_latents=entry.config.expansion * d_in,
            reads=(entry.read.name,),
            writes=(entry.write.name,),
            input_norm="layer_norm" if entry.config.normalise == "layer_norm" else "none",
        )


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")

"""From a checked configuration to dictionaries in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from dictlearn.choices import is_count
from dictlearn.config import ConfigError, build
from dictlearn.data import SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.build import build_named
from dictlearn.hub import load
from dictlearn.lm import LM, reached, widths
from dictlearn.training.learner import Learner, prepare
from dictlearn.training.module import Member
from dictlearn.training.points import Entry, sites_of
from dictlearn.training.schedules import settled
from dictlearn.training.subspace import Size, subspace_sizes
from dictlearn.training.terms import lm_terms
from dictlearn.types import Site

MOST_DEAD_AFTER = 10_000_000  # tokens


def dead_after(dead_after_tokens: int | None, n_tokens: int) -> int:
    """Tokens of silence after which a latent counts as dead."""
    return max(1, min(MOST_DEAD_AFTER, n_tokens // 10)) if dead_after_tokens is None else dead_after_tokens


def build_callbacks(cfg: DictConfig) -> dict[str, Callback]:
    """The run's own callbacks, by name. Raises ConfigError with what is wrong with each."""
    return build_named(cfg.callbacks, "callbacks", Callback, "is no Lightning callback")


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
        dictionary = build_dictionary(entry, width)
        generator = torch.Generator().manual_seed(_seed(cfg.seed, entry.base))
        start, sizes = starts.get(entry.name), sizes_of(entry, lm.model)
        variance = prepare(dictionary, statistics, entry.config.normalise, generator, start, sizes)
        optimizer, terms = build(entry.config.optimizer), build(entry.config.objective)
        for term in lm_terms(terms).values():
            later = reached(lm.model, entry.writes, term.sites(lm.model))
            term.bind(entry.writes, {site: statistics[site.name].variance for site in later})
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
        schedule = settled(build(entry.config.schedule), optimizer.decay)
        members.append(Member(learner, optimizer, schedule, _seed(cfg.seed, f"{entry.base}/training")))
    return members


def captured_sites(found: Sequence[Entry], model: PreTrainedModel) -> list[Site]:
    """Every site whose activations a run needs, once: those of the dictionaries, and what their terms look at."""
    later = [
        site
        for entry in found
        for term in lm_terms(build(entry.config.objective)).values()
        for site in reached(model, entry.writes, term.sites(model))
    ]
    return list(dict.fromkeys([*sites_of(found), *later]))


def sizes_of(entry: Entry, model: PreTrainedModel) -> dict[str, Size]:
    """Of the subspaces that the entry's random directions are drawn in, by read site."""
    return subspace_sizes(entry.config.init_subspace, entry.reads, model)


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


def build_dictionary(entry: Entry, width: Mapping[str, int], device: str = "cpu") -> Dictionary:
    """The dictionary of an entry, with empty weights; `width` of its sites by name."""
    reads, writes = tuple(site.name for site in entry.reads), tuple(site.name for site in entry.writes)
    if entry.config.normalise == "layer_norm" and (len(reads) > 1 or reads != writes):
        raise ConfigError(
            [
                "normalise=layer_norm needs a dictionary that reads and writes one site, not "
                f"{' and '.join(dict.fromkeys((*reads, *writes)))}: use mean_norm or none there, which "
                "dictionaries.NAME.set={normalise:mean_norm} does for one dictionary alone"
            ]
        )
    d_in, d_out = _common(width, reads), _common(width, writes)
    if is_count(dimensions := entry.config.init_subspace, d_in + 1):
        names = ", ".join(reads)
        raise ConfigError([f"init_subspace must be at most the width of {names}, {d_in}, got {dimensions}"])
    with torch.device(device):
        module = build(entry.config.module)
        n_codes = len(reads) if getattr(getattr(module, "func", None), "layered", False) else 1
        try:
            return module(
                d_in=d_in,
                d_out=d_out,
                n_latents=entry.config.expansion * d_in * n_codes,
                reads=reads,
                writes=writes,
                input_norm="layer_norm" if entry.config.normalise == "layer_norm" else "none",
            )
        except TypeError as error:  # a setting that it does not have
            raise ConfigError([f"{OmegaConf.select(entry.config, 'module._target_')}: {error}"]) from error


def _common(width: Mapping[str, int], sites: Sequence[str]) -> int:
    """The width that all `sites` have. Raises ConfigError where they differ."""
    if len({width[site] for site in sites}) > 1:
        listed = ", ".join(f"{site} ({width[site]})" for site in sites)
        raise ConfigError([f"the sites of one dictionary must be equally wide, got {listed}"])
    return width[sites[0]]


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")

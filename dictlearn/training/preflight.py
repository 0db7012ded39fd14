"""Everything that is wrong with a training configuration, found before the LM is loaded or anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.choices import AUTO, is_count
from dictlearn.config import (
    ConfigError,
    build,
    collect,
    dictionary_problems,
    missing,
    unused_overrides,
    value_problems,
)
from dictlearn.data import RowData
from dictlearn.data.module import asked_of_text, store_folder, store_setting_problem
from dictlearn.data.store import store_problems
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.build import build_blocks
from dictlearn.files import folder_problem
from dictlearn.lm import reached, site_width, skeleton
from dictlearn.lm.dry_run import aliases, dry, dry_activations
from dictlearn.training.build import build_callbacks, build_dictionary, starting_dictionaries
from dictlearn.training.plan import lm_dtype
from dictlearn.training.points import Entry, entries, nodes, points, sites_of
from dictlearn.training.resampling import Resample
from dictlearn.training.terms import LMTerm, LossTerm, check_chunks, check_terms, lm_terms, micro_batch_problem

PARTS = ("objective", "optimizer", "schedule")
TRAINER_KEYS = ("_target_", "accelerator", "devices", "precision", "deterministic")


def problems(cfg: DictConfig, overrides: Sequence[str], resuming: bool = False) -> list[str]:
    """What is wrong with the configuration, one sentence each. `resuming`: the run folder is in use already."""
    found = missing(cfg)
    if not isinstance(cfg.get("dictionaries"), DictConfig) or not cfg.dictionaries:
        return [*found, "dictionaries is empty: choose experiment=default or experiment=single"]
    found += value_problems(cfg) + unused_overrides(cfg, overrides)
    if problem := folder_problem("run_dir", cfg.run_dir):
        found.append(problem)
    elif not resuming and not cfg.plan and any(Path(cfg.run_dir).glob("*")):
        found.append(f"run_dir {cfg.run_dir} is not empty: choose another one, or resume={cfg.run_dir}")
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        found.append("trainer=gpu needs a CUDA device, and torch finds none: use trainer=cpu")
    text = None if OmegaConf.missing_keys(cfg.data) else collect(found, lambda: build(cfg.data))
    model = _skeleton(cfg, text, found)
    text = _check_text(cfg, text, model, found)
    collect(found, lambda: _check_loggers(cfg))
    collect(found, lambda: build_blocks(cfg.evaluation))
    collect(found, lambda: build_callbacks(cfg))
    if added := sorted(set(cfg.trainer) - set(TRAINER_KEYS)):
        names = ", ".join(f"trainer.{key}" for key in added)
        found.append(f"{names}: of Lightning's trainer only {', '.join(TRAINER_KEYS[1:])} can be set")
    dictionaries = [] if model is None else collect(found, lambda: entries(cfg, model)) or []
    acts = {} if model is None else dry(lambda: dry_activations(model, sites_of(dictionaries))) or {}
    width = {} if model is None else _widths(model, dictionaries, acts)
    if text is not None and text.store is not None:
        collect(found, lambda: _check_store(cfg, text, dictionaries, width, found))
    init_from = None if resuming else cfg.init_from
    starts = collect(found, lambda: starting_dictionaries(init_from, dictionaries)) or {}
    micro_batch_size = cfg.micro_batch_size if is_count(cfg.micro_batch_size, 1) else None
    for entry in dictionaries:
        _check_sites(entry, acts, found)
        _check_dictionary(entry, width, starts, micro_batch_size, found)
        _check_lm_terms(cfg, entry, model, found)
        _check_resampling(cfg, entry, found)
    if not dictionaries:
        _check_parts(cfg, found)
    return list(dict.fromkeys(found))


def _widths(
    model: PreTrainedModel, dictionaries: Sequence[Entry], acts: Mapping[str, Tensor]
) -> dict[str, int | None]:
    """Of every site; None where it is known once the LM runs."""
    return {
        site.name: acts[site.name].shape[-1] if site.name in acts else site_width(model, site)
        for site in sites_of(dictionaries)
    }


def _skeleton(cfg: DictConfig, text: RowData | None, found: list[str]) -> PreTrainedModel | None:
    if text is not None and not text.is_text:
        if cfg.lm.name is not None:
            found.append(
                f"{text.title} come without a language model, at the one site planted, but lm.name is "
                f"{cfg.lm.name!r}: add experiment=planted, which has lm=none, data=planted and that site"
            )
            return None
        return collect(found, text.own_skeleton)
    if OmegaConf.missing_keys(cfg.lm) or (text is None and cfg.lm.name is None):
        return None
    if not isinstance(cfg.lm.name, str):
        found.append(f"lm.name must be 'embedded', a folder or a Hub id, got {cfg.lm.name!r}")
        return None
    return collect(found, lambda: skeleton(cfg.lm.name, cfg.lm.revision))


def _check_loggers(cfg: DictConfig) -> None:
    nodes = cfg.logger
    broken = (
        [name for name in nodes if not isinstance(nodes[name], DictConfig)]
        if isinstance(nodes, DictConfig)
        else [None]
    )
    if broken:
        names = "logger" if broken == [None] else ", ".join(f"logger.{name}" for name in broken)
        raise ConfigError(
            [f"{names} must have settings, such as the choices in conf/logger (~logger.csv leaves out one)"]
        )
    build(nodes)


def _check_text(
    cfg: DictConfig, text: RowData | None, model: PreTrainedModel | None, found: list[str]
) -> RowData | None:
    if text is not None:
        config = model.config.get_text_config() if model is not None else None
        found += text.problems(getattr(config, "max_position_embeddings", None))
        if problem := store_setting_problem(text, cfg.stream):
            found.append(problem)
            return None
    return text


def _check_store(
    cfg: DictConfig,
    text: RowData,
    dictionaries: Sequence[Entry],
    width: Mapping[str, int | None],
    found: list[str],
) -> None:
    """What can be said of the activation store without the LM's weights and the tokens; of sound values only."""
    if not dictionaries or not all(is_count(cfg[key], 1) for key in ("n_tokens", "batch_size")):
        return
    asked = {
        **asked_of_text(text),
        **{key: cfg[key] for key in ("seed", "n_tokens", "batch_size", "statistics_n_tokens")},
        "lm_dtype": lm_dtype(cfg),
        "sites": width,
    }
    found += store_problems(str(store_folder(str(text.store))), asked)


def _check_sites(entry: Entry, acts: Mapping[str, Tensor], found: list[str]) -> None:
    """Each of several sites has activations of its own."""
    for sites in (entry.reads, entry.writes):
        for same in aliases(acts, sites):
            names = ", ".join(site.name for site in same)
            found.append(
                f"{entry.name}: the sites of one dictionary must have different activations, but {names} are names "
                "of one tensor of this LM: leave all but one out"
            )


def _check_dictionary(
    entry: Entry,
    widths: Mapping[str, int | None],
    starts: Mapping[str, Dictionary],
    micro_batch_size: int | None,
    found: list[str],
) -> None:
    """Build all of it, the weights on the meta device."""
    for part in PARTS:
        built = collect(found, lambda p=part: build(entry.config[p]))
        if part == "objective" and isinstance(built, Mapping):
            found += [
                f"objective.{name} must have the _target_ of a loss term, got {term!r} (~objective.{name}: none)"
                for name, term in built.items()
                if not isinstance(term, LossTerm)
            ]
    if own := dictionary_problems(entry.config):
        found += [f"{entry.name}: {problem}" for problem in own if problem not in found]
        return
    sites = sites_of([entry])
    width = {site.name: n for site in sites if (n := widths[site.name]) is not None}
    if len(width) < len(sites):
        collect(found, lambda: build(entry.config.module.sparsifier))
        return
    dictionary = collect(found, lambda: build_dictionary(entry, width, "meta"))
    if dictionary is not None:
        collect(found, lambda: check_terms(_terms(entry), dictionary))
        collect(found, lambda: check_chunks(entry.name, dictionary, micro_batch_size))
    start = starts.get(entry.name)
    if dictionary is not None and start is not None:
        collect(found, lambda: dictionary.start_from_(start))
        if entry.config.init_subspace not in (None, AUTO):
            found.append("init_subspace has no effect with init_from, whose weights are not random: leave it out")


def _terms(entry: Entry) -> dict[str, LossTerm]:
    """The objective's terms that build; what does not is said of the part."""
    built = collect([], lambda: build(entry.config.objective))
    if not isinstance(built, Mapping):
        return {}
    return {str(name): term for name, term in built.items() if isinstance(term, LossTerm)}


def _check_lm_terms(cfg: DictConfig, entry: Entry, model: PreTrainedModel | None, found: list[str]) -> None:
    """Terms that look at the LM need whole rows, the LM that they are from, and sites that it has."""
    if not (terms := lm_terms(_terms(entry))):
        return
    assert model is not None
    names = ", ".join(f"objective.{name}" for name in terms)
    if not model.config.get_text_config().vocab_size:  # it has nothing else that one could look at
        found.append(f"{names} needs the predictions of a language model, and these data have none of them")
        return
    if cfg.stream != "sequences":
        found.append(f"{names} runs the LM on whole rows: use stream=sequences, got stream={cfg.stream}")
    if (store := OmegaConf.select(cfg, "data.store")) is not None:
        found.append(f"{names} runs the LM in training: use data.store=null, got data.store={store}")
    if problem := micro_batch_problem(terms, cfg.micro_batch_size):
        found.append(problem)
    for term in terms.values():
        collect(found, lambda t=term: _check_later(t, entry, model))


def _check_later(term: LMTerm, entry: Entry, model: PreTrainedModel) -> None:
    """The sites that a term looks at depend on what the dictionary writes."""
    sites = term.sites(model)
    later = dry(lambda: reached(model.requires_grad_(False), entry.writes, sites))
    if later is not None:
        term.bind(entry.writes, dict.fromkeys(later, 1.0))


def _check_resampling(cfg: DictConfig, entry: Entry, found: list[str]) -> None:
    if is_count(cfg.n_tokens, 1):
        terms = [term for term in _terms(entry).values() if isinstance(term, Resample)]
        found += [problem for term in terms if (problem := term.problem(cfg.n_tokens))]


def _check_parts(cfg: DictConfig, found: list[str]) -> None:
    """What can be said of the dictionaries where their sites are not known."""
    for point in collect(found, lambda: points(cfg)) or []:
        for node in (collect(found, lambda p=point: nodes(p.config)) or {}).values():
            for part in PARTS:
                collect(found, lambda n=node, p=part: build(n[p]))
            collect(found, lambda n=node: build(n.module.sparsifier))

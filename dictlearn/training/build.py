"""From a configuration to dictionaries in training: preflight, then objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from dictlearn.config import ConfigError, build, unused_overrides, value_problems
from dictlearn.data import SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM, file_name, resolve_pair, skeleton, widths
from dictlearn.training.learner import Learner, prepare
from dictlearn.training.module import Member
from dictlearn.types import DictlearnError, Site

MOST_DEAD_AFTER = 10_000_000  # tokens
RESIDUAL_WIDE = {"embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out"}


class Entry(NamedTuple):
    """One dictionary of a run: its configuration, its name on disk, its sites."""

    name: str
    config: DictConfig
    read: Site
    write: Site


def preflight(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError with every problem found, before anything is loaded or written."""
    problems = value_problems(cfg) + unused_overrides(cfg, overrides)
    if any(Path(cfg.run_dir).glob("*")):
        problems.append(f"run_dir {cfg.run_dir} is not empty: choose another one, or resume={cfg.run_dir}")
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        problems.append("trainer=gpu needs a CUDA device, and torch finds none: use trainer=cpu")
    if problems:
        raise ConfigError(problems)  # what follows reads these values
    model = _collect(problems, lambda: skeleton(cfg.lm.name, cfg.lm.revision))
    data = _collect(problems, lambda: build(cfg.data))
    if data is not None:
        problems += data.problems(getattr(model.config, "max_position_embeddings", None) if model else None)
    for key, node in cfg.dictionaries.items():
        for part in ("sparsifier", "optimizer", "schedule", "objective"):
            _collect(problems, lambda n=node, p=part: build(n.module[p] if p == "sparsifier" else n[p]))
        if model is not None:
            _collect(problems, lambda n=node, k=key: _sites(model, str(k), n))
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _collect(problems: list[str], attempt: Any) -> Any:
    try:
        return attempt()
    except DictlearnError as error:
        problems.append(str(error))
        return None


def _sites(model: PreTrainedModel, key: str, node: DictConfig) -> tuple[Site, Site]:
    read, write = resolve_pair(model, node.site)
    if node.transcodes and read == write:
        raise DictlearnError(
            f"dictionaries.{key}: a transcoder needs a site that reads and writes, such as mlp.2, got {node.site}"
        )
    if not node.transcodes and read != write:
        raise DictlearnError(
            f"dictionaries.{key}: a sparse autoencoder reads and writes one site, but {node.site} reads "
            f"{read.name} and writes {write.name}: use one of them, or dictionary=transcoder"
        )
    n_latents = node.expansion * model.config.get_text_config().hidden_size
    if read.name.split(".")[0] in RESIDUAL_WIDE:  # of other sites the width is known once the LM runs
        build(node.module.sparsifier).check(n_latents)
    return read, write


def entries(cfg: DictConfig, model: PreTrainedModel) -> list[Entry]:
    """The run's dictionaries, each named by its write site (and its key, where two write the same)."""
    found = [(str(key), node, *_sites(model, str(key), node)) for key, node in cfg.dictionaries.items()]
    names = [file_name(write.name) for *_, write in found]
    return [
        Entry(name if names.count(name) == 1 else file_name(f"{name}_{key}"), node, read, write)
        for name, (key, node, read, write) in zip(names, found, strict=True)
    ]


def sites_of(members: Sequence[Entry]) -> list[Site]:
    """Every site to capture, once."""
    return list(dict.fromkeys(site for entry in members for site in (entry.read, entry.write)))


def dead_after(cfg: DictConfig) -> int:
    """Tokens of silence after which a latent counts as dead."""
    return cfg.dead_after_tokens or max(1, min(MOST_DEAD_AFTER, cfg.n_tokens // 10))


def build_members(
    cfg: DictConfig, found: Sequence[Entry], lm: LM, statistics: Mapping[str, SiteStatistics]
) -> list[Member]:
    """Initialised dictionaries with their objectives; weights depend on the seed and the name alone."""
    width = widths(lm.model, sites_of(found))
    members = []
    for entry in found:
        d_in, d_out = width[entry.read.name], width[entry.write.name]
        dictionary: Dictionary = build(
            entry.config.module,
        )(
            d_in=d_in,
            d_out=d_out,
            n_latents=entry.config.expansion * d_in,
            reads=(entry.read.name,),
            writes=(entry.write.name,),
        )
        generator = torch.Generator().manual_seed(_seed(cfg.seed, entry.name))
        variance = prepare(dictionary, statistics, cfg.normalise == "mean_norm", generator)
        optimizer = build(entry.config.optimizer)
        learner = Learner(
            entry.name, dictionary, build(entry.config.objective), variance, dead_after(cfg), optimizer.clip_norm
        )
        members.append(Member(learner, optimizer, build(entry.config.schedule)))
    return members


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")

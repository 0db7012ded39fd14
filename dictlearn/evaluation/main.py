"""What `evaluate.py` does: dictionaries on disk, evaluated on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dictlearn.config import ConfigError, build, evaluation_problems
from dictlearn.data import EmbeddedText, LocalText, TextData
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.context import EvaluationContext
from dictlearn.evaluation.present import evaluate_and_show
from dictlearn.evaluation.run import Results
from dictlearn.hub import find, load
from dictlearn.lm import LM, load_lm, resolve, skeleton
from dictlearn.types import DictlearnError

TEXTS = {"EmbeddedText": EmbeddedText, "LocalText": LocalText}


def run_evaluation(cfg: DictConfig, console: Console) -> Results:
    """Evaluate every dictionary that `cfg.load` names; reports go to `out/<dictionary>/`, plots to `out/plots/`.

    Without `lm` or `data`, those that the dictionaries were trained on. Raises DictlearnError before the LM loads
    if something is missing or does not fit.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{key} is required: give {key}=<value>" for key in missing)
    refs = cfg.load if isinstance(cfg.load, str) else list(cfg.load)
    folders = find(refs)
    dictionaries = {name: _one(folder) for name, folder in folders.items()}
    if cfg.n_tokens is not None:
        cfg.evaluation.n_tokens = cfg.n_tokens
    if problems := evaluation_problems(cfg.evaluation):
        raise ConfigError(problems)
    lm_name, revision, dtype = _lm(cfg, dictionaries)
    for name, d in dictionaries.items():
        if (own := d.metadata.get("lm_name")) not in (None, lm_name):
            console.print(f"{name} was trained on {own} and is evaluated on {lm_name}", style="yellow")
    text = _text(cfg, dictionaries)
    _check(text, skeleton(lm_name, revision), dictionaries)
    blocks = build(cfg.evaluation.blocks)
    with console.status(f"Loading {lm_name}"):
        lm: LM = load_lm(lm_name, revision, dtype, cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with console.status("Preparing held-out text"):
        rows = text.heldout(lm.tokenizer, cfg.evaluation.n_tokens)
    context = EvaluationContext(
        lm=lm,
        dictionaries={name: d.to(lm.device) for name, d in dictionaries.items()},
        tokens=rows.tokens,
        mask=rows.mask,
        data=rows.info,
        batch_rows=cfg.evaluation.batch_rows,
        weight_files={name: next(folder.glob("*.safetensors")) for name, folder in folders.items()},
    )
    out = Path(cfg.out)
    return evaluate_and_show(context, blocks, {name: out / name for name in folders}, out / "plots", console)


def _one(folder: Path) -> Dictionary:
    dictionary = load(folder)
    assert isinstance(dictionary, Dictionary)  # find() lists folders of one dictionary each
    return dictionary


def _recorded(dictionaries: Mapping[str, Dictionary], key: str, ask: str) -> Any:
    """What all dictionaries recorded under `key`."""
    values = {name: d.metadata.get(key) for name, d in dictionaries.items()}
    distinct = [value for i, value in enumerate(values.values()) if value not in list(values.values())[:i]]
    if len(distinct) != 1 or distinct[0] is None:
        raise DictlearnError(f"The dictionaries do not record one common {key} ({values}): give {ask}.")
    return distinct[0]


def _lm(cfg: DictConfig, dictionaries: Mapping[str, Dictionary]) -> tuple[str, str | None, str | None]:
    if cfg.get("lm") is not None:
        return cfg.lm.name, cfg.lm.revision, cfg.lm.dtype
    name = _recorded(dictionaries, "lm_name", "lm=...")
    revisions = {d.metadata.get("lm_revision") for d in dictionaries.values()}
    if len(revisions) > 1:
        raise DictlearnError(f"The dictionaries are of several revisions of {name}: {revisions}: give lm=...")
    dtypes = {d.metadata.get("lm_dtype") for d in dictionaries.values()}
    return name, revisions.pop(), dtypes.pop() if len(dtypes) == 1 else None


def _text(cfg: DictConfig, dictionaries: Mapping[str, Dictionary]) -> TextData:
    """The text of `cfg.data`, or the recorded one: a known class and its plain values, never a free `_target_`."""
    if cfg.get("data") is not None:
        return build(cfg.data)
    recorded = dict(_recorded(dictionaries, "data", "data=..."))
    kind = recorded.pop("kind", None)
    if kind not in TEXTS:
        raise DictlearnError(f"The recorded text must be one of {', '.join(TEXTS)}, got {kind!r}: give data=....")
    known = {field.name for field in fields(TEXTS[kind])} - {"cache_dir"}  # where to write is not a file's to say
    return TEXTS[kind](**{key: value for key, value in recorded.items() if key in known})


def _check(text: TextData, model: Any, dictionaries: Mapping[str, Dictionary]) -> None:
    problems = text.problems(getattr(model.config, "max_position_embeddings", None))
    for name, dictionary in dictionaries.items():
        for site in dict.fromkeys((*dictionary.reads, *dictionary.writes)):
            try:
                resolve(model, site)
            except DictlearnError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise ConfigError(problems)

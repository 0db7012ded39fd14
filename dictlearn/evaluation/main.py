"""What `evaluate.py` does: dictionaries on disk, evaluated on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from transformers import PreTrainedModel

from dictlearn.config import ConfigError, build, collect, evaluation_problems, missing
from dictlearn.data import EmbeddedText, HubText, LocalText, Planted, RowData
from dictlearn.data.planted import NAME
from dictlearn.data.rows import PLACES
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.build import build_blocks
from dictlearn.evaluation.context import CheckedBlock, EvaluationBlock, EvaluationContext, width_problems
from dictlearn.evaluation.present import evaluate_and_show
from dictlearn.evaluation.run import Results
from dictlearn.hub import locate
from dictlearn.hub.places import Place
from dictlearn.lm import find_device, load_lm, load_tokenizer, resolve, skeleton
from dictlearn.lm.sites import site_width
from dictlearn.types import DictlearnError

TEXTS: dict[str, type[RowData]] = {kind.__name__: kind for kind in (EmbeddedText, HubText, LocalText, Planted)}
OF_TRAINING = ("block_rows", "n_slices", "lm_batch_rows")  # how a text is shuffled: the held-out rows are the same


class _Plan(NamedTuple):
    """What will be evaluated, everything checked that can be without the LM's weights."""

    places: dict[str, Place]
    dictionaries: dict[str, Dictionary]
    lm: tuple[str, str | None, str | None] | None  # name, revision, dtype; None: that of the text, which is none
    text: RowData
    blocks: dict[str, EvaluationBlock]


def run_evaluation(cfg: DictConfig, console: Console) -> Results:
    """Evaluate every dictionary that `cfg.load` names; reports go to `out/<dictionary>/`, plots to `out/plots/`.

    Without `lm` or `data`, those that the dictionaries were trained on. Raises ConfigError with all that is missing
    or does not fit before the LM's weights are loaded.
    """
    with console.status("Checking"):
        plan = _plan(cfg)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"Loading {plan.lm[0]}" if plan.lm else f"Drawing {plan.text.title}"):
        lm = load_lm(*plan.lm, device) if plan.lm else plan.text.own_lm(device)
        assert lm is not None
    with console.status("Preparing held-out text"):
        rows = plan.text.heldout(lm.tokenizer, cfg.evaluation.n_tokens)
    context = EvaluationContext(
        lm=lm,
        dictionaries={name: d.to(lm.device) for name, d in plan.dictionaries.items()},
        tokens=rows.tokens,
        mask=rows.mask,
        data=rows.info,
        batch_rows=cfg.evaluation.batch_rows,
        weight_files={name: place.weights for name, place in plan.places.items()},
        max_norm_ratio=plan.text.max_norm_ratio,
        warnings={name: _other_lm(d, lm.name) for name, d in plan.dictionaries.items()},
    )
    out = Path(cfg.out)
    folders = {name: out / name for name in plan.places}
    results = evaluate_and_show(context, plan.blocks, folders, out / "plots", console)
    console.print(f"Reports: {out}", soft_wrap=True)
    return results


def problems(cfg: DictConfig) -> list[str]:
    """All that `run_evaluation` would refuse, one sentence each."""
    try:
        _plan(cfg)
    except ConfigError as error:
        return error.problems
    return []


def _plan(cfg: DictConfig) -> _Plan:
    """Raises ConfigError with everything that is wrong."""
    own = cfg.get("evaluation")
    if not isinstance(own, DictConfig) or set(own) <= {"blocks"}:  # the block `graph` is there without a choice too
        given = None if isinstance(own, DictConfig) else own
        raise ConfigError([f"evaluation must be a choice of conf/evaluation, got {given!r}"])
    found = _value_problems(cfg)
    if absent := missing(cfg):
        raise ConfigError(absent + found)
    places = None if _load_problem(cfg.load) else collect(found, lambda: _locate(cfg.load))
    dictionaries = None if places is None else collect(found, lambda: {n: p.read() for n, p in places.items()})
    blocks = collect(found, lambda: build_blocks(cfg.evaluation))
    found += [] if blocks is None else _without_effect(cfg, list(blocks))
    if dictionaries is None:
        raise ConfigError(found)
    text = collect(found, lambda: _text(cfg, dictionaries))
    lm = model = None
    if text is not None and not text.is_text:
        model = collect(found, text.own_skeleton)
        if _asks_for_lm(cfg):
            found.append(f"lm has no use, because {text.title} come without a language model: leave it out")
    elif (lm := collect(found, lambda: _lm(cfg, dictionaries))) is not None:
        model = collect(found, lambda: skeleton(*lm[:2]))
    if model is not None:
        name, revision = lm[:2] if lm else (NAME, None)
        found += _site_problems(model, name, dictionaries) or _block_problems(
            model, name, revision, dictionaries, blocks or {}
        )
    if text is not None:
        found += text.problems(getattr(model and model.config.get_text_config(), "max_position_embeddings", None))
    if found or places is None or text is None or blocks is None:
        raise ConfigError(found)
    return _Plan(places, dictionaries, lm, text, blocks)


def _value_problems(cfg: DictConfig) -> list[str]:
    given = {"load": _load_problem, "out": _out_problem}
    checks = [check(cfg[key]) for key, check in given.items() if not OmegaConf.is_missing(cfg, key)]
    problems = [problem for problem in checks if problem]
    if cfg.device is not None:
        collect(problems, lambda: find_device(cfg.device))
    if cfg.n_tokens is not None and "n_tokens" in cfg.evaluation:
        cfg.evaluation.n_tokens = cfg.n_tokens
    return problems + evaluation_problems(cfg.evaluation)


def _without_effect(cfg: DictConfig, blocks: list[str]) -> list[str]:
    """Settings for blocks that are left out, and the graph alone without a prompt."""
    found = [
        f"{key} has no effect: this evaluation has no block {key!r}, it has {', '.join(blocks) or 'none'}"
        for key in ("circuits", "graph")
        if cfg.get(key) and key not in blocks
    ]
    if blocks == ["graph"] and not cfg.get("graph"):
        found.append('evaluation=graph makes nothing without graph="a prompt"')
    return found


def _load_problem(refs: Any) -> str | None:
    """What is wrong with the form of `load`, if anything."""
    listed = list(refs) if isinstance(refs, ListConfig) else [refs]
    if listed and all(isinstance(ref, str) and ref for ref in listed):
        return None
    return (
        "load must be a dictionary folder, a run folder, a quoted glob, user/repository:path on the Hub, "
        f"release/id, or a list [a,b] of them, got {refs!r}"
    )


def _out_problem(out: Any) -> str | None:
    if not isinstance(out, str) or not out:
        return f"out must be the folder for the reports, got {out!r}"
    there = next(path for path in (Path(out), *Path(out).absolute().parents) if path.exists())
    if not there.is_dir():
        return f"out must be a folder, but {there} is a file"
    try:
        TemporaryDirectory(dir=there).cleanup()  # permission bits say nothing to root or of read-only file systems
    except OSError as error:
        return f"out must be a folder that can be written, but {there} cannot: {error.strerror}"
    return None


def _locate(refs: str | ListConfig) -> dict[str, Place]:
    return locate(refs if isinstance(refs, str) else list(refs))


def _other_lm(dictionary: Dictionary, lm_name: str) -> list[str]:
    own = dictionary.metadata.get("lm_name")
    if own is None or own == lm_name or Path(own).resolve() == Path(lm_name).resolve():
        return []
    return [f"was trained on {own}, is evaluated on {lm_name}"]


def _site_problems(model: PreTrainedModel, lm_name: str, dictionaries: Mapping[str, Dictionary]) -> list[str]:
    """Sites that the LM does not have, or that are of another width; `model` needs no weights."""
    problems: list[str] = []
    widths: dict[str, int] = {}
    for name, dictionary in dictionaries.items():
        for site_name in dict.fromkeys((*dictionary.reads, *dictionary.writes)):
            try:
                width = site_width(model, resolve(model, site_name))
            except DictlearnError as error:
                problems.append(f"{name}: {error}")
                continue
            if width is not None:
                widths[site_name] = width
    return problems + width_problems(dictionaries, widths, lm_name)


def _block_problems(
    model: PreTrainedModel,
    lm_name: str,
    revision: str | None,
    dictionaries: Mapping[str, Dictionary],
    blocks: Mapping[str, EvaluationBlock],
) -> list[str]:
    """Why blocks cannot run, by their names."""
    return [
        f"{name}: {problem}"
        for name, block in blocks.items()
        if isinstance(block, CheckedBlock)
        for problem in block.problems(model, lm_name, lambda: load_tokenizer(lm_name, revision), dictionaries)
    ]


def _differing(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What differs between the records of dictionaries: "ctx is 128 (a, b), 64 (c)"."""
    found = []
    for key in sorted({key for record in records.values() for key in record}):
        names: dict[str, list[str]] = {}
        for name, record in records.items():
            names.setdefault(repr(record.get(key)), []).append(name)
        if len(names) > 1:
            listed = [f"{value} ({', '.join(own)})" for value, own in names.items()]
            found.append(f"{key} is {', '.join(listed)}")
    return "; ".join(found)


def _common(records: Mapping[str, Mapping[str, Any]], what: str, ask: str) -> dict[str, Any]:
    """The record that all dictionaries have. Raises DictlearnError with what differs, or is not recorded."""
    if absent := [name for name, record in records.items() if not record]:
        raise DictlearnError(f"{', '.join(absent)} does not record its {what}: give {ask}.")
    if differing := _differing(records):
        raise DictlearnError(f"The dictionaries do not record one common {what}: {differing}: give {ask}.")
    return dict(next(iter(records.values())))


def _asks_for_lm(cfg: DictConfig) -> bool:
    return cfg.get("lm") is not None and cfg.lm.name is not None


def _lm(cfg: DictConfig, dictionaries: Mapping[str, Dictionary]) -> tuple[str, str | None, str | None]:
    if _asks_for_lm(cfg):
        return cfg.lm.name, cfg.lm.revision, cfg.lm.dtype
    keys = ("lm_name", "lm_revision")
    records = {
        name: {key: d.metadata.get(key) for key in keys} if d.metadata.get("lm_name") else {}
        for name, d in dictionaries.items()
    }
    lm = _common(records, "LM", "lm=...")
    dtypes = {d.metadata.get("lm_dtype") for d in dictionaries.values()}
    return lm["lm_name"], lm["lm_revision"], dtypes.pop() if len(dtypes) == 1 else None


def _text(cfg: DictConfig, dictionaries: Mapping[str, Dictionary]) -> RowData:
    """The text of `cfg.data`, or the recorded one: a known class and its plain values, never a free `_target_`."""
    if cfg.get("data") is not None:
        return build(cfg.data)
    records = {}
    for name, d in dictionaries.items():
        record = d.metadata.get("data")
        own = record if isinstance(record, Mapping) else {}
        records[name] = {key: value for key, value in own.items() if key not in OF_TRAINING}
    recorded = _common(records, "text", "data=...")
    kind = recorded.pop("kind", None)
    if kind not in TEXTS:
        raise DictlearnError(f"The recorded text must be one of {', '.join(TEXTS)}, got {kind!r}: give data=....")
    known = {field.name for field in fields(TEXTS[kind]) if field.init} - {*PLACES}  # not a file's to say
    return TEXTS[kind](**{key: value for key, value in recorded.items() if key in known})

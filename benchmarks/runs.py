"""Runs of train.py from Python: several at a time, on activations that are written once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

from dictlearn.config import build
from dictlearn.data import ActivationData
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation import EvaluationContext
from dictlearn.evaluation.build import build_blocks
from dictlearn.evaluation.run import evaluate
from dictlearn.evaluation.sweep import sweep_table
from dictlearn.hub import load
from dictlearn.lm import load_lm, resolve
from dictlearn.training.run import train

CONF = Path(__file__).resolve().parents[1] / "conf"
TINY = (  # overrides that keep a run to seconds
    "n_tokens=4_096",
    "batch_size=128",
    "expansion=1",
    "statistics_n_tokens=2_048",
    "data.block_rows=8",
    "data.lm_batch_rows=8",
    "evaluation.n_tokens=2_000",
)
UNEVALUATED = ("~logger.csv", "~evaluation.blocks.reconstruction", "~evaluation.blocks.behaviour")
Task = TypeVar("Task")
Result = TypeVar("Result")


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of `train.py OVERRIDES`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def run(overrides: Sequence[str], run_dir: Path) -> dict[str, Dictionary]:
    """The dictionaries that `train.py OVERRIDES` trains, by name, neither evaluated nor plotted.

    A run that has ended in `run_dir` is not made again.
    """
    done = run_dir / "done"
    if not done.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        given = [*overrides, *UNEVALUATED, f"run_dir={run_dir}"]
        train(composed(given), given, Console(quiet=True))
        shutil.rmtree(run_dir / "checkpoints")
        done.touch()
    found = load(run_dir)
    assert isinstance(found, dict)
    return found


def measured(dictionaries: Mapping[str, Dictionary], overrides: Sequence[str], out: Path) -> pd.DataFrame:
    """The sweep's table, a row for each dictionary, as `train.py OVERRIDES` evaluates them; reports go to `out`.

    Raises RuntimeError where an evaluation failed.
    """
    cfg = composed(overrides)
    lm = load_lm(cfg.lm.name, cfg.lm.revision, cfg.lm.dtype)
    held = build(cfg.data).heldout(lm.tokenizer, cfg.evaluation.n_tokens)
    context = EvaluationContext(lm, dictionaries, held.tokens, held.mask, batch_rows=cfg.evaluation.batch_rows)
    results = evaluate(context, build_blocks(cfg.evaluation), {name: out / name for name in dictionaries})
    if results.errors:
        raise RuntimeError(f"{out}: {'; '.join(results.errors)}")
    points = {name: {"site": d.writes[0], **d.metadata["point"]} for name, d in dictionaries.items()}
    return sweep_table(points, results.reports)


def activation_data(overrides: Sequence[str], sites: Sequence[str]) -> ActivationData:
    """The activations at `sites` that `train.py OVERRIDES` trains on; with data.store they are written there."""
    cfg = composed(overrides)
    lm = load_lm(cfg.lm.name, cfg.lm.revision, cfg.lm.dtype)
    found = [resolve(lm.model, name) for name in sites]
    data = ActivationData(build(cfg.data), lm, found, cfg.batch_size, cfg.n_tokens, cfg.seed)
    store = data.activation_store
    if store is not None and not store.complete:
        data.statistics(cfg.statistics_n_tokens)
        for _ in data.train_dataloader():
            pass
    data.close()
    return data


def in_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], n_processes: int
) -> Iterator[tuple[Task, Result]]:
    """`function` of every task, in their order, in as many processes; with one, in this one."""
    if n_processes == 1:
        for task in tasks:
            yield task, function(task)
        return
    n_threads = max(1, torch.get_num_threads() // n_processes)
    with ProcessPoolExecutor(
        n_processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(n_threads,)
    ) as pool:
        yield from zip(tasks, pool.map(function, tasks), strict=True)

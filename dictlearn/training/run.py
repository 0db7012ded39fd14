"""What `train.py` does: preflight, train, save, evaluate."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.status import Status

from dictlearn.config import build
from dictlearn.data import ActivationData, TextData
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation import EvaluationContext, Results
from dictlearn.evaluation.plots import plot_training
from dictlearn.evaluation.present import evaluate_and_show
from dictlearn.hub import save
from dictlearn.hub.codecs.native import WEIGHTS
from dictlearn.lm import LM, load_lm
from dictlearn.training.build import build_members, entries, preflight, sites_of
from dictlearn.training.callbacks import ProgressDisplay, RandomState, periodic_checkpoint
from dictlearn.training.module import DictionaryTraining, Member
from dictlearn.types import DictlearnError

CONFIG = "config.yaml"


def train(cfg: DictConfig, overrides: Sequence[str], console: Console) -> Results:
    """Train the dictionaries of `cfg` (or continue those of `cfg.resume`), save and evaluate them.

    Raises DictlearnError before anything is loaded or written if the configuration does not work.
    """
    with console.status("Checking the configuration"):
        cfg, checkpoint = resumed(cfg.resume, overrides) if cfg.resume else (_started(cfg, overrides), None)
    _quieten()
    L.seed_everything(cfg.seed, verbose=False)
    if cfg.trainer.accelerator == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32
    run_dir = Path(cfg.run_dir)
    with console.status("") as status:
        lm, data, members = _load(cfg, status)
        n_steps = len(data.train_dataloader())
        module = DictionaryTraining(members, n_steps, cfg.batch_size)
        trainer = _trainer(cfg, n_steps, console)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    finally:
        _close(trainer)
    if module.global_step < n_steps:
        raise DictlearnError(f"Stopped at step {module.global_step} of {n_steps}; go on with resume={run_dir}")
    plot_training(run_dir / "metrics.csv", run_dir / "plots")
    dictionaries = _save(cfg, lm, data.text, members, run_dir / "dictionaries")
    return _evaluate(cfg, data, dictionaries, run_dir, console)


def _started(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Check the configuration of a new run, then write it into its folder."""
    preflight(cfg, overrides)
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, Path(cfg.run_dir) / CONFIG)
    return cfg


def _quieten() -> None:
    """Lightning's notes that are not for the user of a run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 calling torch 2.13
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")  # it does on resume


def _trainer(cfg: DictConfig, n_steps: int, console: Console) -> L.Trainer:
    run_dir = Path(cfg.run_dir)
    return build(
        cfg.trainer,
        logger=list(build(cfg.logger).values()),
        callbacks=[ProgressDisplay(console), RandomState(), periodic_checkpoint(run_dir / "checkpoints", n_steps)],
        max_steps=n_steps,
        max_epochs=-1,
        enable_progress_bar=False,
        log_every_n_steps=1,  # nothing is logged through Lightning, which warns of short runs
        enable_model_summary=False,
        default_root_dir=run_dir,
    )


def _close(trainer: L.Trainer) -> None:
    """End the W&B run: the next one of a sweep, in this process, is another."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def resumed(folder: str, overrides: Sequence[str]) -> tuple[DictConfig, str]:
    """The configuration of the run in `folder` and its newest checkpoint.

    Raises DictlearnError if there is none, or if other keys are given: a resumed run is the same run.
    """
    if others := [override for override in overrides if not override.startswith("resume=")]:
        raise DictlearnError(f"resume continues the run as it was configured; leave out {', '.join(others)}")
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise DictlearnError(f"resume must be a run folder with {CONFIG}, and {folder} has none")
    checkpoints = sorted((Path(folder) / "checkpoints").glob("step-*.ckpt"))
    if not checkpoints:
        raise DictlearnError(f"{folder} has no checkpoint yet: start the run again in a new folder")
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    cfg.run_dir = folder
    return cfg, str(checkpoints[-1])


def _load(cfg: DictConfig, status: Status) -> tuple[LM, ActivationData, list[Member]]:
    device = "cuda" if cfg.trainer.accelerator == "gpu" else "cpu"
    status.update(f"Loading {cfg.lm.name}")
    lm = load_lm(cfg.lm.name, cfg.lm.revision, cfg.lm.dtype, device)
    found = entries(cfg, lm.model)
    data = ActivationData(build(cfg.data), lm, sites_of(found), cfg.batch_size, cfg.n_tokens, cfg.seed)
    status.update("Measuring the activations")
    statistics = data.statistics(cfg.statistics_n_tokens)
    return lm, data, build_members(cfg, found, lm, statistics)


def _save(
    cfg: DictConfig, lm: LM, text: TextData, members: Sequence[Member], folder: Path
) -> dict[str, Dictionary]:
    """Inference dictionaries by name, written in the native format with where they come from."""
    metadata: dict[str, Any] = {
        "lm_name": lm.name,
        "lm_revision": lm.revision,
        "lm_dtype": lm.dtype,
        "ctx": text.ctx,
        "prepend_bos": (lm.tokenizer.bos_token_id or lm.tokenizer.eos_token_id) is not None,
        "data": {"kind": type(text).__name__, **asdict(text)},
        "seed": cfg.seed,
        "n_tokens": cfg.n_tokens,
    }
    metadata["data"].pop("cache_dir")
    dictionaries = {}
    for member in members:
        dictionary = member.learner.dictionary.for_inference()
        dictionary.metadata = metadata
        save(dictionary, folder / member.learner.name)
        dictionaries[member.learner.name] = dictionary
    return dictionaries


def _evaluate(
    cfg: DictConfig, data: ActivationData, dictionaries: dict[str, Dictionary], run_dir: Path, console: Console
) -> Results:
    with console.status("Preparing held-out text"):
        rows = data.heldout(cfg.evaluation.n_tokens)
    folders = {name: run_dir / "dictionaries" / name for name in dictionaries}
    context = EvaluationContext(
        lm=data.lm,
        dictionaries={name: d.to(data.lm.device) for name, d in dictionaries.items()},
        tokens=rows.tokens,
        mask=rows.mask,
        data=rows.info,
        batch_rows=cfg.evaluation.batch_rows,
        weight_files={name: folder / WEIGHTS for name, folder in folders.items()},
    )
    results = evaluate_and_show(context, build(cfg.evaluation.blocks), folders, run_dir / "plots", console)
    console.print(f"Run folder: {run_dir}")
    return results

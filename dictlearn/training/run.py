"""What `train.py` does: preflight, train, save, evaluate."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

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
from dictlearn.training.callbacks import Environment, ProgressDisplay, RandomState, WholeFiles, periodic_checkpoint
from dictlearn.training.module import DictionaryTraining, Member
from dictlearn.types import DictlearnError

CONFIG = "config.yaml"
log = logging.getLogger(__name__)


def train(cfg: DictConfig, overrides: Sequence[str], console: Console) -> Results:
    """Train the dictionaries of `cfg` (or continue those of `cfg.resume`), save and evaluate them.

    Raises DictlearnError before anything is loaded or written if the configuration does not work.
    """
    with console.status("Checking the configuration"):
        cfg, checkpoint = resumed(cfg.resume, overrides) if cfg.resume else (_started(cfg, overrides), None)
    _quieten()
    L.seed_everything(cfg.seed, verbose=False)
    run_dir = Path(cfg.run_dir)
    with console.status("") as status:
        lm, data, members = _load(cfg, status.update if console.is_terminal else console.print)
        n_steps = len(data.train_dataloader())
        module = DictionaryTraining(members, n_steps, cfg.batch_size)
        trainer = _trainer(cfg, n_steps, console)
    if cfg.trainer.accelerator == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (SystemExit, KeyboardInterrupt):  # SIGTERM, Ctrl-C
        raise DictlearnError(
            f"Stopped at step {module.global_step} of {n_steps}. Go on from the last checkpoint: resume={run_dir}"
        ) from None
    finally:
        _close(trainer)
        torch.set_float32_matmul_precision("highest")  # evaluation selects latents in float32
    _keep_newest(run_dir / "checkpoints")
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
        callbacks=[
            ProgressDisplay(console),
            RandomState(),
            Environment(),
            periodic_checkpoint(run_dir / "checkpoints", n_steps),
        ],
        plugins=[WholeFiles()],
        max_steps=n_steps,
        max_epochs=-1,
        enable_progress_bar=False,
        log_every_n_steps=1,  # nothing is logged through Lightning, which warns of short runs
        enable_model_summary=False,
        default_root_dir=run_dir,
    )


def _keep_newest(folder: Path) -> None:
    """Lightning keeps the checkpoint that a run was resumed from."""
    for old in sorted(folder.glob("step-*.ckpt"))[:-1]:
        old.unlink()


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
    checkpoints = sorted((Path(folder) / "checkpoints").glob("step-*.ckpt"), reverse=True)
    newest = next((checkpoint for checkpoint in checkpoints if _is_whole(checkpoint)), None)
    if newest is None:
        raise DictlearnError(f"{folder} has no whole checkpoint yet: start the run again in a new folder")
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    cfg.run_dir = folder
    return cfg, str(newest)


def _is_whole(checkpoint: Path) -> bool:
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        log.warning("%s is damaged: taking the one before", checkpoint)
        return False
    return True


def _load(cfg: DictConfig, say: Callable[[str], None]) -> tuple[LM, ActivationData, list[Member]]:
    device = "cuda" if cfg.trainer.accelerator == "gpu" else "cpu"
    say(f"Loading {cfg.lm.name}")
    lm = load_lm(cfg.lm.name, cfg.lm.revision, cfg.lm.dtype, device)
    found = entries(cfg, lm.model)
    data = ActivationData(build(cfg.data), lm, sites_of(found), cfg.batch_size, cfg.n_tokens, cfg.seed)
    say("Measuring the activations")
    statistics = data.statistics(cfg.statistics_n_tokens)
    return lm, data, build_members(cfg, found, lm, statistics)


def _save(
    cfg: DictConfig, lm: LM, text: TextData, members: Sequence[Member], folder: Path
) -> dict[str, Dictionary]:
    """Inference dictionaries by name, written in the native format with where they come from."""
    metadata: dict[str, Any] = {
        "lm_name": str(Path(lm.name).resolve()) if Path(lm.name).is_dir() else lm.name,
        "lm_revision": lm.revision,
        "lm_dtype": lm.dtype,
        "ctx": text.ctx,
        "prepend_bos": (lm.tokenizer.bos_token_id or lm.tokenizer.eos_token_id) is not None,
        "data": {"kind": type(text).__name__, **asdict(text)},
        "seed": cfg.seed,
        "n_tokens": cfg.n_tokens,
    }
    metadata["data"].pop("cache_dir")
    if "path" in metadata["data"]:
        metadata["data"]["path"] = str(Path(metadata["data"]["path"]).absolute())
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

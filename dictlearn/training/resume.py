"""Continuing a run: its configuration, its newest whole checkpoint, and whether it still is the same run."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from dictlearn.config import ConfigError
from dictlearn.lm import LM
from dictlearn.training.callbacks import Identity
from dictlearn.types import DictlearnError

CONFIG = "config.yaml"
AUTO = "auto"
MAY_DIFFER = (
    "resume",
    "run_dir",
    "name",
    "plan",
    "logger",
    "evaluation",
    "asked",
)  # nothing of it reaches the weights
COMMITS = ("lm.revision", "data.revision")
PLACES = (
    "lm.name",
    "data.path",
    "data.name",
    "data.cache_dir",
    "data.store",
    "init_from",
    *COMMITS,
)  # where content lies
log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A whole checkpoint: its file and what it holds."""

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        return self.content["global_step"]


def resumed(folder: str, overrides: Sequence[str]) -> tuple[DictConfig, Checkpoint]:
    """The configuration of the run in `folder` and its newest whole checkpoint.

    Raises DictlearnError if there is none, or if other keys are given: a resumed run is the same run.
    """
    if others := [override for override in overrides if not override.startswith("resume=")]:
        raise DictlearnError(f"resume continues the run as it was configured; leave out {', '.join(others)}")
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise DictlearnError(f"resume must be a run folder with {CONFIG}, and {folder} has none")
    newest = newest_whole(Path(folder))
    if newest is None:
        raise DictlearnError(f"{folder} has no whole checkpoint yet: start the run again in a new folder")
    cfg = _stored(path)
    cfg.run_dir = folder
    return cfg, newest


def resumed_if_begun(cfg: DictConfig) -> Checkpoint | None:
    """resume=auto: the newest whole checkpoint in `run_dir`; None where the run has to start.

    Raises ConfigError, with every difference, where `run_dir` holds a run of another configuration.
    """
    path = Path(cfg.run_dir) / CONFIG
    if not path.is_file():
        if any(Path(cfg.run_dir).glob("*")):
            raise DictlearnError(f"run_dir {cfg.run_dir} holds files but no run ({CONFIG}): choose another one")
        return None
    stored = _stored(path)
    for key in COMMITS:
        commit = OmegaConf.select(stored, key)
        if commit is not None and OmegaConf.select(cfg, key) == OmegaConf.select(
            stored, f"asked.{key}", default=commit
        ):
            OmegaConf.update(cfg, key, commit)
    differences = _differences(_written(stored), _written(cfg))
    differences.pop("data.cache_dir", None)
    if differences:
        raise ConfigError(
            f"run_dir {cfg.run_dir} holds a run with {key} = {before!r}, not {after!r}: choose another run_dir "
            "(init_from= takes over the weights)"
            for key, (before, after) in differences.items()
        )
    newest = newest_whole(Path(cfg.run_dir))
    if newest is None and any(Path(cfg.run_dir).glob("dictionaries/*/*.safetensors")):
        raise DictlearnError(
            f"run_dir {cfg.run_dir} holds trained dictionaries but no whole checkpoint to continue from: choose "
            "another run_dir"
        )
    return newest


def newest_whole(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read to its end; damaged ones are passed over with a warning."""
    for path in sorted((run_dir / "checkpoints").glob("step-*.ckpt"), reverse=True):
        try:
            with zipfile.ZipFile(path) as archive:
                whole = archive.testzip() is None  # compares the checksum of every part
            if whole:
                return Checkpoint(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile):
            whole = False
        if not whole:
            log.warning("%s is damaged: taking the one before", path)
    return None


def fix_commit(cfg: DictConfig, key: str, commit: str | None) -> None:
    """Put the commit that a revision stands for into the run's configuration, what was asked for beside it."""
    if commit is None or OmegaConf.select(cfg, key) == commit:
        return
    with open_dict(cfg):
        OmegaConf.update(cfg, f"asked.{key}", OmegaConf.select(cfg, key), force_add=True)
    OmegaConf.update(cfg, key, commit)
    OmegaConf.save(cfg, Path(cfg.run_dir) / CONFIG)


def identity_of(cfg: DictConfig, lm: LM, text: str) -> dict[str, Any]:
    """What makes a run this run; `text` is the fingerprint of its token rows."""
    config = {key: value for key, value in _written(cfg).items() if key not in MAY_DIFFER}
    return {"LM weights": lm.fingerprint(), "text": text, "config": config}


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raise DictlearnError where LM, text or configuration are no longer those that the run began with.

    Files may have moved: LM and text are compared by content.
    """
    before = checkpoint.content["callbacks"][Identity.__qualname__]
    changed = [f"the {key} changed" for key in ("LM weights", "text") if before[key] != identity[key]]
    differences = _differences(before["config"], identity["config"])
    changed += [f"{key} was {old!r}, now {new!r}" for key, (old, new) in differences.items() if key not in PLACES]
    if changed:
        raise DictlearnError(
            "A run continues with the LM, text, sites and schedule that it began with, but "
            f"{'; '.join(changed)}. Start a new run in another folder (init_from= takes over the weights)."
        )


def _written(cfg: DictConfig) -> dict[str, Any]:
    """Every value where it stands; what refers to it is not repeated."""
    written = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(written, dict)
    return {str(key): value for key, value in written.items()}


def _stored(path: Path) -> DictConfig:
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    return cfg


def _differences(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Key -> (before, after) of every value that differs and matters."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {} if before == after else {prefix.rstrip("."): (before, after)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*before, *after]):
        if prefix or key not in MAY_DIFFER:
            found |= _differences(before.get(key), after.get(key), f"{prefix}{key}.")
    return found

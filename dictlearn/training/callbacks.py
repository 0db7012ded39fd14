"""Callbacks: the progress display, periodic checkpoints, and the random state."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dictlearn.kernels import native
from dictlearn.training.module import DictionaryTraining
from dictlearn.types import DictlearnError

MOST_NAMED = 4  # dictionaries that a line of progress names
log = logging.getLogger(__name__)


class ProgressDisplay(Callback):
    """A bar over the steps, tokens/s, and per dictionary the loss, FVU, L0 and dead fraction of the last window.

    Where the output is no terminal, a line after every twentieth of the run, with the step at which its window
    ended, and one after the last step.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, {task.fields[speed]} tokens/s,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.live = Live(console=self.console, refresh_per_second=4)
        self.printed_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.task = self.bar.add_task("train", total=pl_module.n_steps, completed=trainer.global_step, speed="-")
        if self.console.is_terminal:
            self.live.start()
            self._show(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.bar.update(self.task, completed=step, speed=_count(pl_module.latest.get("tokens_per_second")))
        if self.console.is_terminal:
            if step % 10 == 0:
                self._show(pl_module)
        elif pl_module.latest_step - self.printed_step >= max(1, pl_module.n_steps // 20):
            self._print(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.live.is_started:
            self._show(pl_module)
        elif not self.console.is_terminal and pl_module.latest_step > self.printed_step:
            self._print(pl_module)
        self.live.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.live.stop()

    def _show(self, module: DictionaryTraining) -> None:
        self.live.update(Group(self.bar, _table(module)))

    def _print(self, module: DictionaryTraining) -> None:
        self.printed_step = module.latest_step
        self.console.print(_line(module), soft_wrap=True)


def _table(module: DictionaryTraining) -> Table:
    caption = f"of the steps up to {module.latest_step}" if module.latest else None
    table = Table("dictionary", "loss", "FVU", "L0", "dead", box=None, caption=caption)
    for member in module.members:
        table.add_row(member.learner.name, *_values(module, member.learner.name))
    return table


def _line(module: DictionaryTraining) -> str:
    names = [member.learner.name for member in module.members]
    if len(names) > MOST_NAMED:
        fvus = [module.latest[f"{name}/fvu"] for name in names]
        parts = [f"{len(names)} dictionaries: FVU {min(fvus):.4f} to {max(fvus):.4f}"]
    else:
        parts = ["{}: loss {} FVU {} L0 {} dead {}".format(name, *_values(module, name)) for name in names]
    speed = _count(module.latest.get("tokens_per_second"))
    return f"step {module.latest_step}/{module.n_steps}, {speed} tokens/s | " + " | ".join(parts)


def _values(module: DictionaryTraining, name: str) -> list[str]:
    if not module.latest:
        return ["-"] * 4
    loss, fvu, l0, dead = (module.latest[f"{name}/{key}"] for key in ("loss", "fvu", "l0", "frac_dead"))
    return [f"{loss:.4f}", f"{fvu:.4f}", f"{l0:.1f}", f"{dead:.1%}"]


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


class RandomState(Callback):
    """Torch's random state travels with the checkpoint (Lightning leaves it out)."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._restored is not None:
            torch.set_rng_state(self._restored["cpu"])
            if self._restored["cuda"]:
                torch.cuda.set_rng_state_all(self._restored["cuda"])
            self._restored = None


class Environment(Callback):
    """What bit-identical results depend on beside the configuration: kept in the checkpoint, compared on resume."""

    def state_dict(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        versions = {name: version(name) for name in ("torch", "transformers", "lightning", "dictlearn")}
        kernels = "compiled" if native.available() else "torch"
        return {**versions, "threads": torch.get_num_threads(), "device": device, "cpu_kernels": kernels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        now = self.state_dict()
        if changed := [f"{key} {old} -> {now.get(key)}" for key, old in state_dict.items() if now.get(key) != old]:
            log.warning("Resuming where results may differ in the last bits: %s", ", ".join(changed))


class Identity(Callback):
    """What a run must keep to be the same run: LM, text and configuration, in every checkpoint."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity

    def state_dict(self) -> dict[str, Any]:
        return self.identity


class LastCheckpoint(Callback):
    """The last step is saved, whatever the period: a run that ends after it has only to write its results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n_steps = pl_module.n_steps
        if trainer.global_step == n_steps and n_steps % _period(n_steps):
            trainer.save_checkpoint(self.folder / f"step-{n_steps:08d}.ckpt")


class NotWritten(DictlearnError):
    """A checkpoint could not be written."""


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames: it is there whole or not at all, on any file system."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # a full disk; torch says it as a RuntimeError
            partial.unlink(missing_ok=True)
            raise NotWritten(f"Cannot write {path}: {error}.") from error
        partial.replace(path)


def periodic_checkpoint(folder: Path, n_steps: int) -> ModelCheckpoint:
    """Every 500 steps or tenth of the run, whichever comes first; written whole or not at all, the newest kept."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="step-{step:08d}",
        auto_insert_metric_name=False,
        every_n_train_steps=_period(n_steps),
        save_top_k=1,
        save_on_train_epoch_end=False,
    )


def _period(n_steps: int) -> int:
    return max(1, min(500, n_steps // 10))


def keep_newest(folder: Path) -> None:
    """Delete all checkpoints but the newest: Lightning keeps the one that a run was resumed from."""
    for old in sorted(folder.glob("step-*.ckpt"))[:-1]:
        old.unlink()

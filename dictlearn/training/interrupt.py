"""SIGTERM and Ctrl-C: a run in training stops at its next step boundary, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from dictlearn.training.callbacks import keep_newest


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def as_interrupt() -> Iterator[None]:
    """Inside the block SIGTERM is a KeyboardInterrupt, as Ctrl-C is, unless someone else handles it."""
    before = signal.getsignal(signal.SIGTERM)
    mine = before is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


class StopOnSignal(Callback):
    """Saves a checkpoint at the end of the step in which a signal came, and ends the training.

    A second signal interrupts at once. Handlers that someone else installed for
    SIGTERM, such as a cluster's, are left in place.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.requested: str | None = None
        self._own: list[signal.Signals] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the block."""
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        free = (signal.SIG_DFL, signal.default_int_handler, _interrupt)
        self._own = [s for s, handler in before.items() if handler in free]
        for signum in self._own:
            signal.signal(signum, self._request)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for signum in self._own:  # Lightning has put its own in front, which ends the step without saving
            signal.signal(signum, self._request)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.requested is not None:
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt")
            keep_newest(self.folder)
            trainer.should_stop = True

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(signum).name
        self.console.print(f"{self.requested}: saving at the end of this step; again to stop at once")

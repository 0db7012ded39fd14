"""Faithfulness while dictionaries train."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback

from dictlearn.checks import check_count
from dictlearn.circuits.ablation import Ablation
from dictlearn.circuits.block import Circuits
from dictlearn.circuits.cuts import cuts_of, sets_of
from dictlearn.circuits.faithfulness import curve, error_share
from dictlearn.data.planted import PlantedModel
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM
from dictlearn.types import DictlearnError

FILE = "circuits.csv"
log = logging.getLogger(__name__)


class CircuitsInTraining(Callback):
    """Before training, every `every_n_steps` steps and at the end two rows of `folder/circuits.csv` for each task
    and set of dictionaries: `step`, `n_tokens`, `task`, `dictionaries`, `errors`, `error_share`, `cpr`, `n_at_0.8`
    and what else `Curve.summary` has. With errors "scored", those of dictionaries that were never trained carry the
    behaviour; with errors "removed" latents have to. Dictionaries that have no circuit at a step (all latents dead)
    have the reason in `why_not` and no numbers. A resumed run goes on where the rows before its first step end.

    Training is not changed by it: random numbers come from generators of its own.

    Args:
        others: see `Circuits`.
    """

    def __init__(
        self,
        tasks: Sequence[str | Mapping[str, Any]],
        folder: str | Path,
        every_n_steps: int = 500,
        n_pairs: int = 32,
        method: str | Mapping[str, Any] = "relp",
        positions: str = "each",
        ablation: str = "patch",
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        self.settings = Circuits(tasks, n_pairs, method, positions, ablation, baselines=False)
        if not self.settings.tasks:
            raise DictlearnError("Circuits in training need tasks: circuits=[ioi], or callbacks=none.")
        self.path, self.every_n_steps = Path(folder) / FILE, every_n_steps
        self._rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if isinstance(pl_module.lm.model, PlantedModel):
            raise DictlearnError("Planted activations come without a language model: callbacks=none.")
        if self.path.exists():
            before = pd.read_csv(self.path, float_precision="round_trip").to_dict(orient="records")
            self._rows = [dict(row) for row in before if row["step"] < trainer.global_step]
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step < pl_module.n_steps:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == pl_module.n_steps:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, pl_module: Any) -> None:
        dictionaries = {m.learner.name: m.learner.dictionary.for_inference() for m in pl_module.members}
        at = {"step": trainer.global_step, "n_tokens": trainer.global_step * pl_module.tokens_per_batch}
        with torch.autocast(pl_module.device.type, enabled=False):
            for together in sets_of(pl_module.lm.model, dictionaries):
                own = {**at, "dictionaries": " ".join(together)}
                self._rows += [own | row for row in self._of_set(pl_module.lm, together)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(self._rows).to_csv(self.path, index=False)

    def _of_set(self, lm: LM, dictionaries: Mapping[str, Dictionary]) -> list[dict[str, Any]]:
        """A row for each task and treatment of errors; where dictionaries have no circuit now, with the reason."""
        rows: list[dict[str, Any]] = []
        own, cuts = self.settings, cuts_of(lm.model, dictionaries)
        for task, given in own.tasks.items():
            find, test = own.pairs(given, lm, dictionaries)
            scores = own.method.scores(lm.model, cuts, find, own.positions, own.n_rows)
            ablation = Ablation(lm.model, cuts, test, own.ablation, own.n_rows)
            for errors in ("scored", "removed"):
                row: dict[str, Any] = {"task": task, "errors": errors}
                try:
                    row["error_share"] = error_share(scores)
                    row |= curve(lm.model, cuts, ablation, scores, errors, own.order).summary()
                except DictlearnError as error:
                    row["why_not"] = str(error)
                    log.warning("circuits of %s, errors %s: %s", task, errors, error)
                rows.append(row)
        return rows

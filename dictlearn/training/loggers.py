"""The CSV file of a run folder, and what loggers of ours are told beside the metrics."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


class DictionaryLogger(Logger):
    """A logger that knows the dictionaries of a run: `start` before training, `finish` after evaluation."""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """`start` is given each dictionary's configuration."""

    def start(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """`configs`: what each dictionary of the run is made of, by name."""

    def finish(self, reports: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path]) -> None:
        """`reports` and `folders` of the trained dictionaries, by name; empty where the run ended early."""


class CsvLogger(DictionaryLogger):
    """Appends one row per window to `folder/metrics.csv`: `step`, `n_tokens`, `<dictionary>/<metric>`.

    A resumed run keeps the rows before its first step and writes the later ones again. (Lightning's CSVLogger
    deletes the file.)
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return "csv"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step, **metrics}
        if self._columns is None:
            self._columns = list(row)
            kept = [old for old in self._rows() if int(old["step"]) < (step or 0)]
            self._write(kept, mode="w")
        self._write([row], mode="a")

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns or [], extrasaction="ignore")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

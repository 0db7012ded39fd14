"""Weights & Biases: one run per dictionary."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from dictlearn.training.loggers import DictionaryLogger
from dictlearn.types import DictlearnError

MODES = ("online", "offline")


class WandbRuns(DictionaryLogger):
    """Every dictionary is a W&B run of its own, all in the group `group`: a sweep of one pass compares like many.

    Each has its own configuration and metrics, and at the end the numbers of its report as summary and its folder
    as an artefact of type `dictionary`. The run ids are kept in `folder`, so that a resumed run goes on in the
    same W&B runs.

    Args:
        project, entity: where the runs go.
        group: what they share.
        folder: the run folder.
        mode: online, or offline (`wandb sync` uploads later).
    """

    def __init__(
        self, project: str, group: str, folder: str | Path, mode: str = "online", entity: str | None = None
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise DictlearnError(f"logger.wandb.mode must be one of {', '.join(MODES)}, got {mode!r}.")
        if mode == "online" and not wandb.api.api_key:
            raise DictlearnError(
                "logger.wandb.mode=online needs an account: run `wandb login`, set WANDB_API_KEY, or take "
                "logger.wandb.mode=offline."
            )
        self.project, self.entity, self.group = project, entity, group
        self.offline = mode == "offline"
        self.folder = Path(folder)
        self._runs: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "wandb"

    def start(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Open one run per dictionary, `configs` by name."""
        ids = self._ids(list(configs))
        for name, config in configs.items():
            self._runs[name] = wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group,
                name=name,
                id=ids[name],
                resume="allow",
                reinit="create_new",
                config=dict(config),
                dir=self.folder,
                mode="offline" if self.offline else "online",
            )

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """`<dictionary>/<metric>` goes to its dictionary as `<metric>`, what belongs to none to all."""
        shared = {key: value for key, value in metrics.items() if "/" not in key}
        for name, run in self._runs.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in metrics.items() if k.startswith(f"{name}/")}
            run.log({**shared, **own}, step=step)

    def finish(self, reports: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path]) -> None:
        """Store reports and dictionaries, and end the runs."""
        for name, run in self._runs.items():
            if name in reports:
                run.summary.update(_numbers(reports[name]))
                artefact = wandb.Artifact(name, type="dictionary")
                artefact.add_dir(str(folders[name]))
                run.log_artifact(artefact)
            run.finish(exit_code=0 if name in reports else 1)
        self._runs = {}

    def _ids(self, names: list[str]) -> dict[str, str]:
        """The W&B run id of each dictionary, made once per run folder."""
        file = self.folder / "wandb_ids.json"
        ids = json.loads(file.read_text()) if file.exists() else {}
        ids |= {name: uuid.uuid4().hex[:12] for name in names if name not in ids}
        file.write_text(json.dumps(ids, indent=2))
        return {name: ids[name] for name in names}


def _numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """`{"reconstruction.fvu": ...}`: the single numbers of a report's blocks."""
    found: dict[str, float] = {}
    for key, value in report.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}.")
        elif prefix and isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found

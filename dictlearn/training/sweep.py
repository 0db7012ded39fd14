"""The table and the frontier of a sweep: over the points of one run, or over the jobs of a Hydra multirun.

Nothing heavy is imported until a sweep has ended: Hydra makes the callback at the start of every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from dictlearn.training.points import Entry

NOT_SWEPT = ("run_dir", "resume", "logger", "name")


def write_run_table(found: Iterable[Entry], reports: Mapping[str, Mapping[str, Any]], run_dir: Path) -> None:
    """`sweep.csv` and `plots/frontier.png` over the dictionaries of one run."""
    from dictlearn.evaluation.sweep import sweep_table, write_sweep

    points = {entry.name: {"site": entry.site, **entry.values} for entry in found}
    write_sweep(sweep_table(points, reports), run_dir)


class SweepTable(Callback):
    """In the folder of `train.py -m ...`: `sweep.csv` and `plots/frontier.png` over the jobs that have ended.

    Written after every job, since Hydra ends a sweep with a failed job by an error, and at the end, since jobs on a
    cluster end in processes of their own.
    """

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:  # noqa: ARG002 - Hydra's signature
        if config.hydra.mode == RunMode.MULTIRUN:
            write_jobs_table(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        write_jobs_table(Path(config.hydra.sweep.dir))


def write_jobs_table(folder: Path) -> None:
    """Over the run folders in `folder`; jobs without a report are left out. What varied between them is swept."""
    found = (path.parent for path in folder.glob("*/config.yaml"))
    jobs = sorted(found, key=lambda job: (len(job.name), job.name))  # 2 before 10
    configs = {
        job: _flat(OmegaConf.to_container(OmegaConf.load(job / "config.yaml"), resolve=False)) for job in jobs
    }
    varied = [
        key for key in dict.fromkeys(k for c in configs.values() for k in c) if _varies(key, configs.values())
    ]
    points: dict[str, dict[str, Any]] = {}
    reports: dict[str, dict[str, Any]] = {}
    for job in jobs:
        for file in sorted(job.glob("dictionaries/*/report.json")):
            report = json.loads(file.read_text())
            name = f"{job.name}/{file.parent.name}"
            site = "+".join(report["dictionary"]["writes"])
            points[name] = {key: configs[job].get(key) for key in varied} | {"site": site}
            reports[name] = report
    if not reports:
        return
    from dictlearn.evaluation.sweep import sweep_table, write_sweep

    write_sweep(sweep_table(points, reports), folder)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Single values by dotted key; where a dictionary refers to shared settings, its value is the reference."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if not prefix and key in NOT_SWEPT:
            continue
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _varies(key: str, configs: Iterable[Mapping[str, Any]]) -> bool:
    values = [config.get(key) for config in configs]
    return any(value != values[0] for value in values)

"""Train sparse dictionaries: `python train.py [key=value ...]`. See conf/train.yaml for every key."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from dictlearn.types import DictlearnError


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float:
    """Returns the mean FVU of the run's dictionaries, which a sweeper minimises."""
    from dictlearn.training.run import train

    hydra_cfg = HydraConfig.get()
    cfg.run_dir = cfg.run_dir  # `now` becomes a fixed time
    if hydra_cfg.mode == RunMode.MULTIRUN:
        overrides = re.sub(r"[^A-Za-z0-9_.-]+", "-", hydra_cfg.job.override_dirname)
        cfg.run_dir = str(Path(cfg.run_dir) / f"{hydra_cfg.job.num}_{overrides}"[:120])
    try:
        results = train(cfg, hydra_cfg.overrides.task, Console())
    except DictlearnError as error:
        sys.exit(str(error))
    if results.errors:
        sys.exit(1)
    fvus = [report["reconstruction"]["fvu"] for report in results.reports.values()]
    return sum(fvus) / len(fvus)


if __name__ == "__main__":
    main()

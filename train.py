"""Train sparse dictionaries: `python train.py [key=value ...]`. See conf/train.yaml for every key."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from dictlearn.types import DictlearnError, Stopped

CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float:
    """Returns the mean FVU of the run's dictionaries, which a sweeper minimises."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("Starting"):
        from dictlearn.training.run import train

    hydra_cfg = HydraConfig.get()
    job = hydra_cfg.job.num if hydra_cfg.mode == RunMode.MULTIRUN else None
    try:
        results = train(cfg, hydra_cfg.overrides.task, console, job)
    except Stopped as error:
        sys.exit(str(error))  # the jobs after it do not start
    except DictlearnError as error:
        if job is None:
            sys.exit(str(error))
        console.print(f"Job {job} failed: {error}", markup=False, soft_wrap=True)
        raise  # the other jobs of the sweep still run
    if results.errors and job is not None:
        raise DictlearnError(f"Job {job}: {'; '.join(results.errors)}")
    if results.errors:
        sys.exit(1)
    fvus = [report["reconstruction"]["fvu"] for report in results.reports.values() if "reconstruction" in report]
    return sum(fvus) / len(fvus) if fvus else float("nan")


def further(cfg: DictConfig, overrides: list[str], job: int | None) -> None:
    """Raise DictlearnError for what is wrong beside the command line."""
    from dictlearn.training.run import check_ahead

    check_ahead(cfg, overrides, job)


if __name__ == "__main__":
    from dictlearn.overrides import enter

    enter(CONF, "train", main, further)

"""Train sparse dictionaries: `python train.py [key=value ...]`. See conf/train.yaml for every key."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from dictlearn.types import DictlearnError

CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float:
    """Returns the mean FVU of the run's dictionaries, which a sweeper minimises."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("Starting"):
        from dictlearn.training.run import Stopped, train

    hydra_cfg = HydraConfig.get()
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    try:
        results = train(cfg, hydra_cfg.overrides.task, console, hydra_cfg.job.num if in_sweep else None)
    except Stopped as error:
        sys.exit(str(error))
    except DictlearnError as error:
        if in_sweep:
            raise  # the other jobs of the sweep still run
        sys.exit(str(error))
    if results.errors and in_sweep:
        raise DictlearnError("; ".join(results.errors))
    if results.errors:
        sys.exit(1)
    fvus = [report["reconstruction"]["fvu"] for report in results.reports.values() if "reconstruction" in report]
    return sum(fvus) / len(fvus) if fvus else float("nan")


def further_problems(cfg: DictConfig, overrides: list[str]) -> list[str]:
    """Of a configuration whose other mistakes are known already."""
    if cfg.resume not in (None, "auto"):
        return ["resume continues the run as it was configured: leave out the other keys"]
    from dictlearn.training.preflight import problems

    return problems(cfg, overrides)


if __name__ == "__main__":
    from dictlearn.overrides import refuse_mistakes

    try:
        refuse_mistakes(CONF, "train", sys.argv[1:], further_problems)
    except DictlearnError as error:
        sys.exit(str(error))
    main()

"""Evaluate dictionaries: `python evaluate.py load=FOLDER out=DIR`. See conf/evaluate.yaml for every key."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from dictlearn.types import DictlearnError

CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Exit code 1 when something could not be computed; the reports keep the rest."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("Starting"):
        from dictlearn.evaluation.main import run_evaluation

    try:
        results = run_evaluation(cfg, console)
    except DictlearnError as error:
        sys.exit(str(error))
    if results.errors:
        sys.exit(1)


def further(cfg: DictConfig, overrides: list[str], job: int | None) -> None:  # noqa: ARG001
    """Raise DictlearnError for what is wrong beside the command line."""
    from dictlearn.config import ConfigError
    from dictlearn.evaluation.main import problems

    if found := problems(cfg):
        raise ConfigError(found)


if __name__ == "__main__":
    from dictlearn.overrides import enter

    enter(CONF, "evaluate", main, further)

"""Evaluate dictionaries: `python evaluate.py load=FOLDER out=DIR`. See conf/evaluate.yaml for every key."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig
from rich.console import Console

from dictlearn.types import DictlearnError


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


if __name__ == "__main__":
    main()

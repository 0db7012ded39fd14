"""Small runs of the two doors, in this process or as commands."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

from dictlearn.evaluation.main import run_evaluation
from dictlearn.evaluation.run import Results
from dictlearn.training.run import train

ROOT = Path(__file__).parent.parent
SMALL = (
    "n_tokens=10_000",
    "batch_size=256",
    "expansion=2",
    "sparsifier.k=4",
    "statistics_n_tokens=2_048",
    "data.block_rows=16",
    "data.lm_batch_rows=16",
    "evaluation.n_tokens=3_000",
    "evaluation.blocks.behaviour.n_tokens=1_000",
)


def composed(config: str, overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(config, list(overrides))


def run_train(run_dir: Path, *overrides: str) -> Results:
    """A small training run in this process."""
    small = [o for o in SMALL if not ("sparsifier=relu" in overrides and o.startswith("sparsifier."))]
    cfg = composed("train", [*small, *overrides, f"run_dir={run_dir}"])
    return train(cfg, overrides, Console(quiet=True))


def run_evaluate(*overrides: str) -> Results:
    return run_evaluation(composed("evaluate", overrides), Console(quiet=True))


def command(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """`python train.py ...` as a user runs it, who can end it with Ctrl-C; output is captured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd or ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def weight_hashes(run_dir: Path) -> dict[str, str]:
    """sha256 of every dictionary's weights, by name."""
    files = sorted((run_dir / "dictionaries").glob("*/sae_weights.safetensors"))
    return {file.parent.name: sha256(file.read_bytes()).hexdigest() for file in files}

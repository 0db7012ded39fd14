"""The peers that benchmarks run beside dictlearn, each in a virtual environment of its own, installed from PyPI."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import torch

PACKAGES = {
    "saelens": "sae-lens==6.54.12",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "sparsify": "eai-sparsify==1.3.3",
}
READERS = {"circuit_tracer": "circuit-tracer==0.5.0"}  # it reads dictionaries and trains none
FOLDER = Path(os.environ.get("DICTLEARN_CACHE") or Path.home() / ".cache" / "dictlearn") / "benchmarks"


class Unavailable(Exception):
    """A peer cannot be installed here; the text says why."""


def python_of(peer: str) -> str:
    """The interpreter that has `peer`; dictlearn's is this one. Installs it at the first call.

    Raises Unavailable with the last line of what pip says.
    """
    package = {**PACKAGES, **READERS}.get(peer)
    if package is None:
        return sys.executable
    folder = FOLDER / peer
    python = folder / "bin" / "python"
    done = folder / package
    if done.exists():
        return str(python)
    print(f"Installing {package} into {folder}", file=sys.stderr)
    if _torch_is_here():  # the peer uses the torch of this interpreter, so that the same build is compared
        venv.create(folder, with_pip=True, system_site_packages=True)
    else:
        venv.create(folder, with_pip=True)
    wanted = [f"torch=={torch.__version__.partition('+')[0]}", package]
    pip = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True, check=False
    )
    if pip.returncode:
        raise Unavailable((pip.stderr.strip().splitlines() or ["pip failed"])[-1])
    # a torchvision that some of them ask for is built for another build of torch, and none of the steps needs it
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=False)
    done.touch()
    return str(python)


def _torch_is_here() -> bool:
    """Whether torch belongs to the interpreter that a virtual environment with system packages would see."""
    return Path(torch.__file__).is_relative_to(sys.base_prefix)

"""Memory of a training run of 20,000 steps: `python benchmarks/memory.py [key=value ...]`.

Runs train.py with a small batch and samples the resident memory of its process at every window that it logs. Prints
the mean of each tenth of the run and writes benchmarks/results/memory.json; flat means that the last tenth is the
second one (the first fills the stream's buffer).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
N_STEPS, BATCH_SIZE = 20_000, 64


def resident(pid: int) -> float:
    """MB, as Linux counts them."""
    status = Path(f"/proc/{pid}/status").read_text()
    return float(status.split("VmRSS:")[1].split()[0]) / 1e3


def last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines()[1:] if metrics.exists() else []
    first = lines[-1].split(",")[0] if lines else ""
    return int(first) if first.isdigit() else 0


def sample(run_dir: Path, overrides: list[str]) -> list[tuple[int, float]]:
    """(step, MB) over the run."""
    small = [
        f"n_tokens={N_STEPS * BATCH_SIZE}",
        f"batch_size={BATCH_SIZE}",
        "expansion=2",
        "evaluation.n_tokens=1000",
    ]
    command = [sys.executable, str(ROOT / "train.py"), *small, *overrides, f"run_dir={run_dir}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    found: list[tuple[int, float]] = []
    while process.poll() is None:
        step = last_step(run_dir / "metrics.csv")
        if 0 < step < N_STEPS and (not found or step > found[-1][0]):
            found.append((step, resident(process.pid)))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = sample(Path(folder) / "run", sys.argv[1:])
    steps, memory = np.array(found).T
    tenths = [float(memory[(steps * 10 // N_STEPS) == part].mean()) for part in range(10)]
    result = {
        "n_steps": N_STEPS,
        "batch_size": BATCH_SIZE,
        "overrides": sys.argv[1:],
        "resident_mb_by_tenth": [round(value, 1) for value in tenths],
        "last_over_second": round(tenths[-1] / tenths[1], 4),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    (ROOT / "benchmarks" / "results" / "memory.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""One contender of a benchmark in a process of its own: `python benchmarks/worker.py NAME`, driven over a pipe.

Reads a JSON line with the specification, builds the contender's step and says "ready", or why there is none. Then
it makes as many steps as each further line says, and answers with their seconds. Needs torch and the contender's
package alone.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

N_BATCHES = 4


def planted(spec: dict[str, Any], seed: int = 0) -> list[torch.Tensor]:
    """Batches with a sparse structure: 2 d directions, 16 of them in each token, and noise; unit variance."""
    generator = torch.Generator().manual_seed(seed)
    d, n = spec["d"], spec["batch_size"]
    directions = torch.nn.functional.normalize(torch.randn(2 * d, d, generator=generator), dim=-1)
    batches = []
    for _ in range(N_BATCHES):
        active = torch.randint(2 * d, (n, 16), generator=generator)
        size = torch.rand(n, 16, generator=generator) + 0.5
        x = torch.einsum("nk,nkd->nd", size, directions[active]) + 0.02 * torch.randn(n, d, generator=generator)
        batches.append((x / x.std()).to(spec["device"]))
    return batches


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what packages print is not an answer
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    spec = json.loads(sys.stdin.readline())
    torch.set_num_threads(spec["n_threads"])
    torch.manual_seed(0)
    batches = planted(spec)
    try:
        step = importlib.import_module(f"run_{sys.argv[1]}").make_step(spec, batches[0])
    except NotImplementedError as error:
        print(error, file=answers, flush=True)
        return
    synchronise = torch.cuda.synchronize if spec["device"] == "cuda" else lambda: None
    print("ready", file=answers, flush=True)
    done = 0
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            synchronise()
            started = time.perf_counter()
            step(batches[done % N_BATCHES])
            synchronise()
            seconds.append(time.perf_counter() - started)
            done += 1
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()

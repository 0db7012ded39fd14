"""One training step of a dictionary, beside the peers: `python benchmarks/step.py [--help]`.

Every contender is a process of its own with the same planted batches; they take turns, a few steps each, so that a
noisy machine is noisy for all. Reported is the median over the rounds, as a ratio to ours, beside the dense product
of the encoder alone. Prints a table and writes benchmarks/results/step_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import torch
from environments import PACKAGES, Unavailable, python_of
from hardware import hardware
from table import table

FOLDER = Path(__file__).parent
OURS, PRODUCT = "dictlearn", "product"


class Contender:
    """A worker process that makes steps when asked. Raises Unavailable where it cannot."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [python_of(name), str(FOLDER / "worker.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # threads that spin are in the way of the next one's
        )
        answer = self._ask(json.dumps(spec))
        if answer != "ready":
            self.close()
            raise Unavailable(answer)

    def steps(self, n: int) -> list[float]:
        """Seconds of each of `n` steps."""
        return json.loads(self._ask(str(n)))

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise Unavailable((self.process.communicate()[1].strip().splitlines() or ["it ended"])[-1])
        return answer


def run(names: list[str], spec: dict[str, Any], n_rounds: int, n_warmup: int) -> dict[str, Any]:
    """Name -> {"seconds": [one per round]} or {"unavailable": why}."""
    results: dict[str, Any] = {}
    contenders: dict[str, Contender] = {}
    for name in names:
        try:
            contenders[name] = Contender(name, spec)
            contenders[name].steps(n_warmup)
            results[name] = {"seconds": []}
        except Unavailable as error:
            results[name] = {"unavailable": str(error)}
    running = [name for name in names if "seconds" in results[name]]
    for _ in range(n_rounds):
        for name in running:
            results[name]["seconds"] += contenders[name].steps(3)[1:]  # the first finds the caches of others
    for name in running:
        contenders[name].close()
    return results


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured: every sparsifier in both precisions, and TopK with 5 % of the latents dead."""
    shared = {
        "d": arguments.d,
        "n_latents": arguments.n_latents,
        "k": arguments.k,
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        "n_threads": torch.get_num_threads(),
    }
    found = [
        {**shared, "sparsifier": sparsifier, "precision": precision, "dead_fraction": 0.0}
        for sparsifier in arguments.sparsifiers.split(",")
        for precision in arguments.precisions.split(",")
    ]
    if "top_k" in arguments.sparsifiers:
        found.insert(1, {**found[0], "dead_fraction": 0.05})
    return found


def show(results: list[dict[str, Any]]) -> None:
    for cell in results:
        spec, times = cell["spec"], cell["contenders"]
        title = f"{spec['sparsifier']}, {spec['precision']}"
        title += f", {spec['dead_fraction']:.0%} dead with AuxK" if spec["dead_fraction"] else ""
        ours = median(times[OURS]["seconds"]) if "seconds" in times[OURS] else None
        rows = []
        for name, result in times.items():
            if "unavailable" in result:
                rows.append([name, result["unavailable"][:80], "", ""])
                continue
            middle, best = median(result["seconds"]), min(result["seconds"])
            rows.append([name, f"{1e3 * middle:.1f}", f"{1e3 * best:.1f}", f"{middle / ours:.2f}" if ours else "-"])
        print(table(title, ["contender", "ms a step (median)", "fastest", "times ours"], rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--d", type=int, default=768 if on_gpu else 512)
    parser.add_argument("--n-latents", type=int, default=24_576 if on_gpu else 16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8192 if on_gpu else 2048)
    parser.add_argument("--sparsifiers", default="top_k,batch_top_k,relu,jump_relu")
    parser.add_argument(
        "--precisions", default="mixed,float32", help="mixed: bfloat16 products; float32 on both sides"
    )
    parser.add_argument("--peers", default=",".join(PACKAGES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    arguments = parser.parse_args()
    names = [OURS, PRODUCT, *filter(None, arguments.peers.split(","))]
    results = []
    for spec in cells(arguments):
        results.append({"spec": spec, "contenders": run(names, spec, arguments.rounds, arguments.warmup)})
        show(results[-1:])
    out = FOLDER / "results" / f"step_{arguments.device}.json"
    out.write_text(json.dumps({"hardware": hardware(), "peers": PACKAGES, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

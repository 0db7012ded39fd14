"""One training step of a dictionary, beside the peers: `python benchmarks/step.py [--help]`.

Every contender is a process of its own with the same planted batches; they take turns, a few steps each, so that a
noisy machine is noisy for all. Reported is the median over the rounds, as a ratio to ours and as a fraction of a
yardstick: the dense product of the encoder, and moving the bytes that Adam has to (peers/run_yardstick.py). Prints
a table and writes benchmarks/results/step_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import Contender
from environments import PACKAGES, Unavailable
from hardware import hardware
from table import table

FOLDER = Path(__file__).parent
OURS, YARDSTICK, PRODUCT = "dictlearn", "yardstick", "product"


def run(names: list[str], spec: dict[str, Any], n_rounds: int, n_warmup: int) -> dict[str, Any]:
    """Name -> {"seconds": [two per round]} or {"unavailable": why}."""
    results: dict[str, Any] = {}
    contenders: dict[str, Contender] = {}
    for name in names:
        try:
            contenders[name] = Contender(name, spec, FOLDER / "worker.py")
            contenders[name].turn(n_warmup)
            results[name] = {"seconds": []}
        except Unavailable as error:
            results[name] = {"unavailable": str(error)}
    running = [name for name in names if "seconds" in results[name]]
    for _ in range(n_rounds):
        for name in running:
            results[name]["seconds"] += contenders[name].turn(3)[1:]  # the first finds the caches of others
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
    found = []
    for sparsifier in arguments.sparsifiers.split(","):
        for i, precision in enumerate(arguments.precisions.split(",")):
            cell = {**shared, "sparsifier": sparsifier, "precision": precision, "dead_fraction": 0.0}
            found.append(cell)
            if sparsifier == "top_k" and i == 0:
                found.append({**cell, "dead_fraction": 0.05})
    return found


def show(results: list[dict[str, Any]]) -> None:
    for cell in results:
        spec, times = cell["spec"], cell["contenders"]
        title = f"{spec['sparsifier']}, {spec['precision']}"
        title += f", {spec['dead_fraction']:.0%} dead with AuxK" if spec["dead_fraction"] else ""
        ours, yardstick = (median(times[name].get("seconds", [math.nan])) for name in (OURS, YARDSTICK))
        rows = []
        for name, result in times.items():
            if "unavailable" in result:
                rows.append([name, result["unavailable"][:80], "", "", ""])
                continue
            middle, best = median(result["seconds"]), min(result["seconds"])
            ratios = [f"{middle / ours:.2f}", f"{yardstick / middle:.0%}"]
            rows.append([name, f"{1e3 * middle:.1f}", f"{1e3 * best:.1f}", *ratios])
        columns = ["contender", "ms a step (median)", "fastest, ms", "times ours", "of the yardstick"]
        print(table(title, columns, rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--d", type=int, default=768 if on_gpu else 512)
    parser.add_argument("--n-latents", type=int, default=24_576 if on_gpu else 16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8192 if on_gpu else 2048)
    parser.add_argument("--sparsifiers", default="top_k,batch_top_k,relu,jump_relu", help="of these")
    parser.add_argument(
        "--precisions", default="mixed,float32", help="mixed: bfloat16 products; float32 on both sides"
    )
    parser.add_argument("--peers", default=",".join(PACKAGES))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender, two timed steps in each")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each contender before the first turn")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    arguments = parser.parse_args()
    names = [OURS, YARDSTICK, PRODUCT, *filter(None, arguments.peers.split(","))]
    results: list[dict[str, Any]] = []
    for spec in cells(arguments):
        results.append({"spec": spec, "contenders": run(names, spec, arguments.rounds, arguments.warmup)})
        show(results[-1:])
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out / f"step_{arguments.device}.json"
    out.write_text(json.dumps({"hardware": hardware(), "peers": PACKAGES, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

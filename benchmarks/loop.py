"""Lightning against a bare loop with the same work: `python benchmarks/loop.py [--help]`.

One process trains two equal dictionaries on planted batches in memory, in turns of --steps steps: one under
Lightning as train.py sets it up, one in a bare loop (loss, zero_grad, backward, clipping, optimizer, projection,
schedule, statistics window). Once with train.py's own callbacks as well. Reported is the median over the rounds.
Prints a table and writes benchmarks/results/loop_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import in_turns
from hardware import hardware
from table import table

FOLDER = Path(__file__).parent
CHECKPOINT_STEPS = 500  # the callbacks of a run write one then
N_WARMUP = 20


def summary(turns: list[dict[str, float]], n_steps: int) -> dict[str, float]:
    """Milliseconds a step, each the median over the turns; the overhead is the median of the differences."""
    lightning = [1e3 * turn["seconds"] / n_steps for turn in turns]
    bare = [1e3 * turn["bare_seconds"] / n_steps for turn in turns]
    overhead = median(a - b for a, b in zip(lightning, bare, strict=True))
    return {
        "lightning_ms": median(lightning),
        "bare_ms": median(bare),
        "overhead_ms": overhead,
        "overhead_percent": 100 * overhead / median(bare),
    }


def show(results: dict[str, Any]) -> None:
    columns = ["", "Lightning, ms a step", "bare loop, ms a step", "overhead, ms", "overhead, %"]
    rows = []
    for name, result in results.items():
        if "unavailable" in result:
            rows.append([f"{name}: {result['unavailable']}", "", "", "", ""])
        else:
            keys = ("lightning_ms", "bare_ms", "overhead_ms", "overhead_percent")
            rows.append([name, *(f"{result[key]:.2f}" for key in keys)])
    print(table("Lightning's loop", columns, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--d", type=int, default=768 if on_gpu else 256)
    parser.add_argument("--n-latents", type=int, default=24_576 if on_gpu else 2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument(
        "--batch-size", type=int, default=32_768 if on_gpu else 1100, help="so that a step takes about 20 ms"
    )
    parser.add_argument("--precision", default="mixed", choices=["mixed", "float32"])
    parser.add_argument("--steps", type=int, default=40, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    arguments = parser.parse_args()
    if N_WARMUP + arguments.steps * arguments.rounds >= CHECKPOINT_STEPS:
        parser.error(f"steps x rounds must stay below {CHECKPOINT_STEPS - N_WARMUP}, where a checkpoint is written")
    with tempfile.TemporaryDirectory() as folder:
        sizes = {key: vars(arguments)[key] for key in ("d", "n_latents", "k", "batch_size", "device", "precision")}
        spec = {**sizes, "folder": folder, "n_threads": torch.get_num_threads(), "n_warmup": N_WARMUP}
        programs = {
            "Lightning": ("loop", {**spec, "callbacks": False}),
            "with train.py's callbacks": ("loop", {**spec, "callbacks": True}),
        }
        results = in_turns(programs, arguments.rounds, arguments.steps)
    for result in results.values():
        if "turns" in result:
            result |= summary(result["turns"], arguments.steps)
    show(results)
    report = {"hardware": hardware(), "spec": {**spec, "folder": None}, "results": results}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"loop_{arguments.device}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""From token ids to a trained dictionary, beside the peers: `python benchmarks/pipeline.py [--help]`.

Every contender is a process with its own trainer on the same random token ids and the same LM with random weights,
which is loaded before the clock starts. They take turns of --steps steps, enough for whole cycles of their buffers.
Reported are tokens/s in steady state, the median over the rounds, and the seconds from the loaded LM to the first
step. The LM alone bounds all that read it. Prints a table and writes benchmarks/results/pipeline_<device>.json.
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
from environments import PACKAGES
from hardware import hardware
from lms import CTX, N_ROWS, SHAPES, save_lm
from table import table

FOLDER = Path(__file__).parent
CELLS = {"pythia-70m": (3, 4096), "gpt2": (8, 24_576), "tiny": (1, 256)}  # LM -> layer, latents
OURS = "dictlearn"
LM_BATCH_ROWS, N_SLICES = 32, 8  # ours by default; what a peer calls otherwise is set to the same


def contenders(lm: str, folder: str, arguments: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> program and specification."""
    layer, n_latents = CELLS[lm]
    batch_size, n_steps = arguments.batch_size, arguments.steps
    spec = {
        "folder": folder,
        "layer": layer,
        "sites": [f"resid_post.{layer}"],
        "n_latents": n_latents,
        "k": arguments.k,
        "batch_size": batch_size,
        "ctx": CTX,
        "lm_batch_rows": LM_BATCH_ROWS,
        "block_rows": arguments.block_rows,
        "buffer_rows": (2 * n_steps - 2) * batch_size // CTX,  # one refill in each turn
        "device": arguments.device,
        "n_threads": torch.get_num_threads(),
        "n_warmup": 2,
    }
    until_full = (N_SLICES + 1) / 2 * arguments.block_rows * (CTX - 1) / batch_size  # the shuffle's first groups
    ours = {**spec, "n_warmup": int(until_full) + n_steps}
    mixed, full = {"precision": "mixed"}, {"precision": "float32"}
    bfloat16 = {"lm_dtype": "bfloat16"}
    float32 = {"lm_dtype": "float32"}
    found: dict[str, tuple[str, dict[str, Any]]] = {
        OURS: ("dictlearn", {**ours, **mixed, **(float32 if arguments.device == "cpu" else bfloat16)}),
        "dictlearn, LM bfloat16": ("dictlearn", {**ours, **mixed, **bfloat16}),
        "dictlearn, all float32": ("dictlearn", {**ours, **full, **float32}),
        "dictlearn, from a store": ("dictlearn", {**spec, **mixed, **bfloat16, "store_steps": 4 * n_steps}),
        "the LM alone, float32": ("lm", {**spec, **full, **float32}),
        "the LM alone, bfloat16": ("lm", {**spec, **full, **bfloat16}),
    }
    if arguments.device == "cuda":
        del found["dictlearn, LM bfloat16"]  # what ours is by default
    for peer in filter(None, arguments.peers.split(",")):
        found[peer] = (peer, {**spec, **full})
        found[f"{peer}, bfloat16"] = (peer, {**spec, **mixed})
    return found


def summary(result: dict[str, Any], n_steps: int, batch_size: int) -> dict[str, float]:
    """Tokens/s of one contender."""
    speeds = [n_steps * batch_size / turn["seconds"] for turn in result["turns"]]
    last = result["turns"][-1]
    whole = last["n_steps"] * batch_size / (last["setup_seconds"] + last["busy_seconds"])
    return {
        "tokens_per_second": median(speeds),
        "fastest": max(speeds),
        "setup_seconds": last["setup_seconds"],
        "whole_run_tokens_per_second": whole,
        "whole_run_n_tokens": last["n_steps"] * batch_size,
    }


def show(lm: str, results: dict[str, Any]) -> None:
    layer, n_latents = CELLS[lm]
    columns = ["contender", "tokens/s", "fastest", "ours / this", "setup s", "whole run, tokens/s"]
    ours = results[OURS]
    rows = []
    for name, result in results.items():
        if "unavailable" in result:
            rows.append([name, result["unavailable"][:60], "", "", "", ""])
            continue
        speed = result["tokens_per_second"]
        ratio = f"{ours['tokens_per_second'] / speed:.2f}" if "tokens_per_second" in ours else "-"
        whole = f"{result['whole_run_tokens_per_second']:,.0f}"
        rows.append(
            [name, f"{speed:,.0f}", f"{result['fastest']:,.0f}", ratio, f"{result['setup_seconds']:.1f}", whole]
        )
    print(table(f"{lm} shape, layer {layer}, {n_latents:,} latents", columns, rows), flush=True)
    for name, ratio in over_fastest_peer(results).items():
        print(f"{name}: {ratio:.2f} times the fastest peer", flush=True)


def over_fastest_peer(results: dict[str, Any]) -> dict[str, float]:
    """Speed of each of ours over that of the fastest peer, whatever its precision."""
    speeds = {name: result["tokens_per_second"] for name, result in results.items() if "turns" in result}
    peers = [speed for name, speed in speeds.items() if name.partition(",")[0] in PACKAGES]
    return {name: speed / max(peers) for name, speed in speeds.items() if peers and name.partition(",")[0] == OURS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--lms", default="pythia-70m,gpt2", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8192 if on_gpu else 2048)
    parser.add_argument("--block-rows", type=int, default=256, help="rows that ours reads from the LM at a time")
    parser.add_argument("--peers", default=",".join(PACKAGES), help="empty: none")
    parser.add_argument("--steps", type=int, default=16, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    arguments = parser.parse_args()
    cells = []
    for lm in arguments.lms.split(","):
        with tempfile.TemporaryDirectory() as folder:
            save_lm(lm, Path(folder), N_ROWS if lm != "tiny" else 64)
            programs = contenders(lm, folder, arguments)
            results = in_turns(programs, arguments.rounds, arguments.steps)
        for result in results.values():
            if "turns" in result:
                result |= summary(result, arguments.steps, arguments.batch_size)
        specs = {name: {**spec, "folder": lm} for name, (_, spec) in programs.items()}
        ratios = over_fastest_peer(results)
        cells.append({"lm": lm, "specs": specs, "over_fastest_peer": ratios, "contenders": results})
        show(lm, results)
    report = {"hardware": hardware(), "peers": PACKAGES, "results": cells}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"pipeline_{arguments.device}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

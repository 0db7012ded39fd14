"""Many dictionaries in one pass of the LM: `python benchmarks/many.py [--help]`.

One dictionary on the residual stream after each layer of an LM with random weights. Compared are the time of a step
of all of them in one pass, and (1) one LM forward of the same tokens and as many single steps, measured in the same
process in turns; (2) a run for each layer: those of the first and the last layer are measured as processes of their
own, and the others are counted as evenly between them, since a run for a layer reads the LM up to that layer.
Prints a table and writes benchmarks/results/many_<device>.json.
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
from lms import CTX, SHAPES, save_lm
from table import table

FOLDER = Path(__file__).parent
N_ROWS, LM_BATCH_ROWS, N_SLICES = 2048, 32, 8
ONE_PASS, FIRST, LAST = "one pass", "run of the first layer", "run of the last layer"


def n_layers(lm: str) -> int:
    settings = SHAPES[lm]
    return settings.get("n_layer") or settings["num_hidden_layers"]


def programs(folder: str, arguments: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    sites = [f"resid_post.{layer}" for layer in range(n_layers(arguments.lm))]
    sizes = {key: vars(arguments)[key] for key in ("n_latents", "k", "batch_size", "block_rows", "device")}
    until_full = (N_SLICES + 1) / 2 * arguments.block_rows * (CTX - 1) / arguments.batch_size
    spec = {
        **sizes,
        "folder": folder,
        "ctx": CTX,
        "lm_batch_rows": LM_BATCH_ROWS,
        "lm_dtype": arguments.lm_dtype,
        "precision": "mixed",
        "n_threads": torch.get_num_threads(),
        "n_warmup": int(until_full) + 2,
    }
    return {
        ONE_PASS: ("many", {**spec, "sites": sites}),
        FIRST: ("dictlearn", {**spec, "sites": sites[:1]}),
        LAST: ("dictlearn", {**spec, "sites": sites[-1:]}),
    }


def summary(results: dict[str, Any], n_sites: int, n_steps: int) -> dict[str, float]:
    """Milliseconds for one step of all dictionaries; ratios are medians over the rounds."""
    turns = list(zip(*(results[name]["turns"] for name in (ONE_PASS, FIRST, LAST)), strict=True))
    parts = [one["lm_seconds"] + one["single_steps_seconds"] for one, _, _ in turns]
    runs = [n_sites * (first["seconds"] + last["seconds"]) / 2 for _, first, last in turns]
    ones = [one["seconds"] for one, _, _ in turns]

    def ms(seconds: list[float]) -> float:
        return 1e3 * median(seconds) / n_steps

    return {
        "one_pass_ms": ms(ones),
        "lm_ms": ms([one["lm_seconds"] for one, _, _ in turns]),
        "single_steps_ms": ms([one["single_steps_seconds"] for one, _, _ in turns]),
        "separate_runs_ms": ms(runs),
        "over_parts": median(one / part for one, part in zip(ones, parts, strict=True)),
        "over_runs": median(one / run for one, run in zip(ones, runs, strict=True)),
    }


def show(found: dict[str, float], n_sites: int, title: str) -> None:
    parts = found["lm_ms"] + found["single_steps_ms"]
    rows = [
        [f"{n_sites} dictionaries in one pass", f"{found['one_pass_ms']:.0f}", "1.00"],
        ["one LM forward", f"{found['lm_ms']:.0f}", ""],
        [f"{n_sites} single steps", f"{found['single_steps_ms']:.0f}", ""],
        ["LM forward and single steps", f"{parts:.0f}", f"{found['over_parts']:.2f}"],
        [f"{n_sites} runs", f"{found['separate_runs_ms']:.0f}", f"{found['over_runs']:.2f}"],
    ]
    print(table(title, ["", "ms a step", "one pass / this"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="an LM of width 256 and 2,048 latents")
    parser.add_argument("--lm", help=f"of {', '.join(SHAPES)}; default: gpt2, or small with --quick")
    parser.add_argument("--lm-dtype", help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--n-latents", type=int, help="default: 24,576 on CUDA, 6,144 on a CPU, 2,048 if quick")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8192 if on_gpu else 2048)
    parser.add_argument("--block-rows", type=int, default=256 if on_gpu else 64, help="rows read at a time")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn: about a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    arguments = parser.parse_args()
    arguments.lm = arguments.lm or ("small" if arguments.quick else "gpt2")
    arguments.n_latents = arguments.n_latents or (2048 if arguments.quick else 24_576 if on_gpu else 6144)
    n_sites = n_layers(arguments.lm)
    with tempfile.TemporaryDirectory() as folder:
        save_lm(arguments.lm, Path(folder), N_ROWS if arguments.lm != "tiny" else 64)
        results = in_turns(programs(folder, arguments), arguments.rounds, arguments.steps)
    for name, result in results.items():
        if "unavailable" in result:
            parser.exit(1, f"{name}: {result['unavailable']}\n")
    found = summary(results, n_sites, arguments.steps)
    sizes = f"{arguments.n_latents:,} latents each, batch {arguments.batch_size:,}"
    show(found, n_sites, f"{arguments.lm} shape, {n_sites} layers, {sizes}")
    spec = {key: value for key, value in vars(arguments).items() if key != "out"}
    report = {"hardware": hardware(), "spec": spec, "summary": found, "results": results}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"many_{arguments.device}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""L0 against FVU and delta CE of every architecture: `python benchmarks/frontier.py [--help]`.

Autoencoders of a residual stream of the embedded LM, and transcoders of an MLP with and without a skip path, each
at several sparsities and seeds with the settings that train.py has for it. All of one seed see the same activations
in the same order, written once to a store. Measured on held-out text. Prints what the architectures reach at equal
L0 and whether known results appear, and writes benchmarks/results/frontier.csv, .png and .json.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd
from equal_l0 import Rows, at_equal_l0, holds, ratio, with_error, write_json
from hardware import hardware
from runs import TINY, activation_data, in_parallel, measured, run
from table import table as plain_table

from dictlearn.evaluation.plots import LEGEND, legend_beside, log_ticks, new_figure, save_plot
from dictlearn.evaluation.sweep import RESULTS

RESID, MLP = "resid_post.2", "mlp.2"
STORED = (RESID, "mlp_in.2", "mlp_out.2")
K = (4, 8, 16, 32, 64)


class Architecture(NamedTuple):
    """Overrides of train.py, and the key whose values are the sparsities."""

    overrides: Sequence[str]
    key: str = "sparsifier.k"
    values: Sequence[float] = K
    site: str = RESID


ARCHITECTURES = {
    "relu": Architecture(["sparsifier=relu"], "sparsifier.l1", (0.025, 0.05, 0.1, 0.2, 0.4)),
    "relu, p annealed": Architecture(
        ["sparsifier=relu", "sparsifier.p=0.2"], "sparsifier.l1", (0.01, 0.02, 0.04, 0.08, 0.16)
    ),
    "top_k": Architecture(["sparsifier=top_k"]),
    "batch_top_k": Architecture(["sparsifier=batch_top_k"]),
    "top_k, layer norm": Architecture(["sparsifier=top_k", "normalise=layer_norm"]),
    "batch_top_k, layer norm": Architecture(["sparsifier=batch_top_k", "normalise=layer_norm"]),
    "jump_relu": Architecture(["sparsifier=jump_relu"], "sparsifier.target_l0"),
    "jump_relu, tanh": Architecture(
        ["sparsifier=jump_relu_tanh"], "sparsifier.coefficient", (0.0005, 0.001, 0.002, 0.004, 0.008)
    ),
    "abs_top_k": Architecture(["sparsifier=abs_top_k"]),
    "group_max": Architecture(["sparsifier=group_max"]),
    "gated": Architecture(["dictionary=gated"], "sparsifier.l1", (0.05, 0.1, 0.15, 0.2, 0.4)),
    "matryoshka": Architecture(["dictionary=matryoshka", "sparsifier=batch_top_k"]),
    "bilinear": Architecture(["dictionary=bilinear", "sparsifier=top_k"]),
    "transcoder": Architecture(["dictionary=transcoder"], site=MLP),
    "transcoder, skip": Architecture(["dictionary=transcoder", "dictionary.module.skip=true"], site=MLP),
}
EXPECTED = [  # FVU of the first is at most that of the second
    ("batch_top_k", "top_k"),
    ("batch_top_k, layer norm", "top_k, layer norm"),
    ("batch_top_k", "relu"),
    ("top_k", "relu"),
    ("transcoder, skip", "transcoder"),
]
QUICK = (*TINY, "evaluation.blocks.behaviour.n_tokens=1_000")
COLUMNS = ("fvu", "delta_ce", "frac_dead")
PANELS = {"fvu": "FVU", "delta_ce": "delta CE, nats per token"}
MARKERS = "os^DvPX*"


class Task(NamedTuple):
    """One run of train.py: an architecture with one seed, all its sparsities in one pass."""

    name: str
    seed: int
    overrides: tuple[str, ...]
    run_dir: Path


def tasks(arguments: argparse.Namespace, shared: Sequence[str], work: Path) -> list[Task]:
    """A run for each seed and architecture; the activations of each seed are written before this returns."""
    found = []
    for seed in range(arguments.seeds):
        of_seed = [*shared, f"seed={seed}", f"data.store={work / f'acts-{seed}'}"]
        activation_data(of_seed, STORED)
        for name in arguments.architectures:
            overrides, key, values, site = ARCHITECTURES[name]
            grid = f"grid={{{key}:[{','.join(map(str, values[:: arguments.every]))}]}}"
            given = ("experiment=single", f"site={site}", *overrides, *of_seed, grid)
            found.append(Task(name, seed, given, work / f"seed-{seed}" / name.replace(", ", "_").replace(" ", "_")))
    return found


def train(task: Task) -> list[dict[str, Any]]:
    """A row for each dictionary, by its sparsity `value`, as the architecture sets it."""
    csv = task.run_dir / "measured.csv"
    if not csv.exists():
        dictionaries = run(task.overrides, task.run_dir)
        measured(dictionaries, task.overrides, task.run_dir / "reports").to_csv(csv, index=False)
    columns = ["site", "value", *RESULTS]
    table = pd.read_csv(csv).rename(columns={ARCHITECTURES[task.name].key: "value"})[columns]
    found = [
        {"architecture": task.name, "seed": task.seed, **dict(zip(columns, row, strict=True))}
        for row in table.itertuples(index=False)
    ]
    return sorted(found, key=lambda row: row["value"])


def plot(rows: Rows, png: Path) -> None:
    """A pair of panels for each site: a line for each architecture through its means over seeds."""
    sites = list(dict.fromkeys(row["site"] for row in rows))
    figure, axes = new_figure(2 * len(sites), most_columns=2, margin=LEGEND)
    handles = []
    for i, name in enumerate(dict.fromkeys(row["architecture"] for row in rows)):
        own = [row for row in rows if row["architecture"] == name]
        pair = axes[2 * sites.index(own[0]["site"]) :]
        look = {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "linestyle": "-" if i < 10 else "--"}
        for ax, column in zip(pair, PANELS, strict=False):
            points = sorted(_means(own, column))
            ax.plot(*zip(*points, strict=True), **look, markersize=4, linewidth=1, label=name)
        handles.append(pair[0].lines[-1])
    for i, ax in enumerate(axes):
        column, label = list(PANELS.items())[i % 2]
        ax.set_xscale("log")
        log_ticks(ax.xaxis)
        ax.set_xlabel("L0, active latents per token")
        ax.set_ylabel(label)
        ax.set_title(sites[i // 2], fontsize="small")
        if column == "fvu":
            ax.set_yscale("log")
            log_ticks(ax.yaxis)
        else:
            ax.set_yscale("symlog", linthresh=0.01)  # it may be negative
    legend_beside(figure, handles)
    save_plot(figure, pd.DataFrame(list(rows)), png)


def _means(rows: Rows, column: str) -> list[tuple[float, float]]:
    """L0 and `column` of each sparsity, means over seeds; a log axis has no L0 of 0."""
    values = dict.fromkeys(row["value"] for row in rows)
    groups = [[row for row in rows if row["value"] == value] for value in values]
    means = [(fmean(row["l0"] for row in group), fmean(row[column] for row in group)) for group in groups]
    return [(l0, mean) for l0, mean in means if l0 > 0]


def expected(rows: Rows, l0s: Sequence[float]) -> list[dict[str, Any]]:
    """The known results at every L0 that both architectures reach, and whether they appear within the error."""
    ratios = [ratio(rows, a, b, l0) for a, b in EXPECTED for l0 in l0s]
    return [{**found, "holds": holds(found)} for found in ratios if found["n_seeds"]]


def show(equal: Rows, known: Rows, l0s: Sequence[float]) -> None:
    names = list(dict.fromkeys(row["architecture"] for row in equal))
    for column in COLUMNS:
        cells = {
            (row["architecture"], row["l0"]): with_error(row[column], row[f"{column}_stderr"]) for row in equal
        }
        lines = [[name, *(cells.get((name, l0), "-") for l0 in l0s)] for name in names]
        print(plain_table(f"{column} at equal L0", ["architecture", *(f"L0 {l0:g}" for l0 in l0s)], lines))
    lines = [
        [
            f"{r['a']} over {r['b']}",
            f"{r['l0']:g}",
            with_error(r["ratio"], r["stderr"]),
            "yes" if r["holds"] else "NO",
        ]
        for r in known
    ]
    print(plain_table("FVU of the first over the second, at most 1", ["pair", "L0", "ratio", "holds"], lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tokens", type=int, default=1_000_000, help="activations that each dictionary sees")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--architectures", default=list(ARCHITECTURES), type=lambda text: text.split(";"))
    parser.add_argument("--l0s", default=[8.0, 16.0, 32.0], type=lambda text: [float(l0) for l0 in text.split(",")])
    parser.add_argument("--every", type=int, default=1, help="take every n-th sparsity")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--work", type=Path, help="a folder to keep activations and runs in, and to go on from")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one seed, few tokens")
    arguments = parser.parse_args(argv)
    shared = [f"n_tokens={arguments.n_tokens}", "evaluation.blocks.behaviour.n_tokens=16_384"]
    if arguments.quick:
        shared, arguments.seeds, arguments.jobs = list(QUICK), 1, 1
        arguments.every = max(2, arguments.every)
    work = arguments.work or Path(tempfile.mkdtemp())
    try:
        found = []
        for task, rows in in_parallel(train, tasks(arguments, shared, work.absolute()), arguments.jobs):
            found += rows
            print(f"{task.name}, seed {task.seed}: {len(rows)} dictionaries", flush=True)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    write(found, arguments)


def write(rows: Rows, arguments: argparse.Namespace) -> None:
    equal, known = at_equal_l0(rows, arguments.l0s, COLUMNS), expected(rows, arguments.l0s)
    show(equal, known, arguments.l0s)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(rows, arguments.out / "frontier.png")
    report = {
        "hardware": hardware(),
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("work", "out")},
        "architectures": {name: ARCHITECTURES[name]._asdict() for name in arguments.architectures},
        "at_equal_l0": equal,
        "expected": known,
    }
    write_json(report, arguments.out / "frontier.json")


if __name__ == "__main__":
    main()

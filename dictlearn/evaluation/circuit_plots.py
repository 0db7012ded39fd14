"""The plot of a report's section `circuits`: faithfulness over the number of nodes, a panel for each task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dictlearn.evaluation.plots import legend_beside, log_ticks, new_figure, save_plot
from dictlearn.evaluation.report import value_at

LABELS = {
    ("dictionaries", "scored"): "dictionaries, errors scored",
    ("dictionaries", "kept"): "dictionaries, errors kept",
    ("dictionaries", "removed"): "dictionaries, errors removed",
    ("neurons", "scored"): "neurons",
    ("pca", "scored"): "PCA",
    ("random", "scored"): "random",
}
LOWEST, HIGHEST = -0.5, 1.5  # what is beyond is in the CSV


def plot_circuits(report: Mapping[str, Any], png: Path) -> Path:
    """Faithfulness of circuits of the dictionaries and the baselines; the CSV has all rows of all curves."""
    tasks: Mapping[str, Any] = report["circuits"]["tasks"]
    table = circuit_table(report)
    figure, axes = new_figure(len(tasks), margin=2.0)
    for ax, task in zip(axes, tasks, strict=True):
        for color, ((kind, mode), label) in enumerate(LABELS.items()):
            own = table[(table.task == task) & (table.cut == kind) & (table.errors == mode) & (table.n_nodes > 0)]
            if len(own):
                ax.plot(own.n_nodes, own.faithfulness, color=f"C{color}", label=label, linewidth=1)
                ax.fill_between(own.n_nodes, own.low, own.high, color=f"C{color}", alpha=0.15, linewidth=0)
        ax.set_xscale("log")
        log_ticks(ax.xaxis, [10**power for power in range(7) if 10**power <= 2 * table.n_nodes.max()])
        ax.set_ylim(LOWEST, HIGHEST)
        for level in (0, 1):
            ax.axhline(level, color="gray", linewidth=0.5)
        ax.set_xlabel("nodes in the circuit")
        ax.set_ylabel("faithfulness")
        ax.set_title(task, fontsize="small")
    legend_beside(figure, _handles(axes))
    png.parent.mkdir(parents=True, exist_ok=True)
    return save_plot(figure, table, png)


def _handles(axes: list[Any]) -> list[Any]:
    """One line for each label."""
    found = {line.get_label(): line for ax in axes for line in ax.lines}
    return [line for label, line in found.items() if label in LABELS.values()]


def circuit_table(report: Mapping[str, Any]) -> pd.DataFrame:
    """One row for each size of each curve, with its task, its cut (dictionaries or a baseline) and its errors."""
    parts = [
        pd.DataFrame(numbers["curve"]).assign(task=task, cut=cut, errors=mode)
        for task, section in report["circuits"]["tasks"].items()
        for cut, modes in section.items()
        if isinstance(modes, Mapping)
        for mode, numbers in modes.items()
        if isinstance(numbers, Mapping)
    ]
    return pd.concat(parts, ignore_index=True)


def sweep_table(reports: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each dictionary and task: L0, FVU and the faithfulness of circuits of fixed numbers of nodes, of
    dictionaries that were measured by themselves.
    """
    rows = []
    for name, report in reports.items():
        section = report.get("circuits", {})
        if len(section.get("dictionaries", [])) != 1:
            continue
        for task, numbers in section["tasks"].items():
            scored = {key: value for key, value in numbers["dictionaries"]["scored"].items() if key != "curve"}
            place = {"l0": value_at(report, "sparsity.l0.mean"), "fvu": value_at(report, "reconstruction.fvu")}
            kind = report["dictionary"]["sparsifier"]["kind"]
            rows.append({"dictionary": name, "sparsifier": kind, "task": task, **place, **scored})
    return pd.DataFrame(rows)


def plot_sweep(table: pd.DataFrame, png: Path, size: int = 100) -> Path:
    """Faithfulness at `size` nodes against L0 and against FVU, a line of panels for each task."""
    tasks = list(dict.fromkeys(table.task))
    figure, axes = new_figure(2 * len(tasks), most_columns=2, margin=2.0)
    for task, panels in zip(tasks, zip(axes[::2], axes[1::2], strict=True), strict=True):
        for ax, column in zip(panels, ("l0", "fvu"), strict=True):
            for color, kind in enumerate(dict.fromkeys(table.sparsifier)):
                own = table[(table.task == task) & (table.sparsifier == kind)]
                points = sorted(zip(own[column], own[f"faithfulness_at_{size}"], strict=True))
                ax.plot(*zip(*points, strict=True), "o-", color=f"C{color}", label=str(kind))
            ax.set_xlabel({"l0": "L0", "fvu": "FVU"}[column])
            ax.set_ylabel(f"faithfulness at {size} nodes")
            ax.set_title(task, fontsize="small")
    legend_beside(figure, axes[0].lines)
    png.parent.mkdir(parents=True, exist_ok=True)
    return save_plot(figure, table, png)

"""The plot of a report's section `circuits`: faithfulness over the number of nodes, a panel for each task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dictlearn.evaluation.plots import legend_beside, log_ticks, new_figure, save_plot

LABELS = {
    ("dictionaries", "scored"): "dictionaries",
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

"""Plots of the section `circuits`: faithfulness over nodes of one report, over L0 and FVU of several."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, MaxNLocator

from dictlearn.evaluation.circuit_table import CUTS, errors_of, modes_of, site_of
from dictlearn.evaluation.frontier import LABEL, MARKERS, MOST_PANEL_SITES
from dictlearn.evaluation.plots import COLORS, legend_beside, log_ticks, new_figure, save_plot
from dictlearn.evaluation.report import value_at

LABELS = {
    ("dictionaries", "scored"): "dictionaries, errors scored",
    ("dictionaries", "kept"): "dictionaries, errors kept",
    ("dictionaries", "removed"): "dictionaries, errors removed",
    ("neurons", "scored"): "neurons",
    ("pca", "scored"): "PCA",
    ("random", "scored"): "random, errors scored",
    ("random", "removed"): "random, errors removed",
}
LOWEST, HIGHEST = -0.5, 1.5  # what is beyond is in the CSV
FIRST = ("dictionary", "cut", "site", "architecture", "sparsifier", "task", "errors", "error_share", "l0", "fvu")
AXES = {"l0": "L0", "fvu": "FVU"}
STYLES: dict[str, dict[str, Any]] = {
    "removed": {"linestyle": "-", "markersize": 4, "linewidth": 1.2},
    "scored": {"linestyle": "--", "markersize": 4, "linewidth": 1.2, "markerfacecolor": "white"},
}
BASELINES = {  # cut, errors -> label, of a sweep
    ("neurons", "none"): "neurons",
    ("pca", "none"): "PCA",
    ("random", "removed"): "random, errors removed",
    ("random", "scored"): "random, errors scored",
}
GRAYS = {"neurons": "0.2", "pca": "0.5", "random": "0.7"}


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
        ax.set_title(task if ax.lines else f"{task}: no curves", fontsize="small")
        ax.set_xscale("log")
        log_ticks(ax.xaxis, [10**power for power in range(7) if 10**power <= 2 * table.n_nodes.max()])
        ax.set_ylim(LOWEST, HIGHEST)
        for level in (0, 1):
            ax.axhline(level, color="gray", linewidth=0.5)
        ax.set_xlabel("nodes in the circuit")
        ax.set_ylabel("faithfulness")
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
        _numbers(numbers["curve"]).assign(task=task, cut=cut, errors=mode)
        for task, section in report["circuits"]["tasks"].items()
        for cut in CUTS
        for mode, numbers in modes_of(section, cut).items()
    ]
    empty = pd.DataFrame(columns=["n_nodes", "faithfulness", "low", "high", "task", "cut", "errors"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def _numbers(curve: Mapping[str, Any]) -> pd.DataFrame:
    """A curve whose columns are numbers, NaN for None."""
    return pd.DataFrame(curve).astype({column: float for column in curve if column != "n_nodes"})


def sweep_table(reports: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The summary numbers of circuits of dictionaries that were measured each by itself.

    One row for each dictionary, task and treatment of errors (`cut` is "dictionary"), and one for each baseline
    beside it (`cut` is its kind; `errors` is "none" where it has no errors). `site` is where the dictionary writes.
    Architecture, sparsifier, L0 and FVU are those of the dictionary, and empty for baselines.
    """
    rows: list[dict[str, Any]] = []
    for name, report in reports.items():
        section = report.get("circuits", {})
        if len(section.get("dictionaries", [])) != 1:
            continue
        of_dictionary = {
            "architecture": _architecture(report["dictionary"]),
            "sparsifier": report["dictionary"]["sparsifier"]["kind"],
            "l0": value_at(report, "sparsity.l0.mean"),
            "fvu": value_at(report, "reconstruction.fvu"),
        }
        for task, numbers in section["tasks"].items():
            for cut in CUTS:
                own = cut == CUTS[0]
                for mode, found in modes_of(numbers, cut).items():
                    row = {"dictionary": name, "cut": "dictionary" if own else cut, "site": site_of(report)}
                    row |= {"task": task, "errors": errors_of(numbers[cut], mode)}
                    row |= {"error_share": numbers[cut].get("error_share")} | (of_dictionary if own else {})
                    rows.append(row | {key: value for key, value in found.items() if key != "curve"})
    summary = [key for row in rows for key in row if key not in FIRST]
    return pd.DataFrame(rows, columns=[*FIRST, *dict.fromkeys(summary)])


def _architecture(dictionary: Mapping[str, Any]) -> str:
    """Its kind, from where it reads if it writes elsewhere, and whether it has a skip path."""
    reads = "+".join(dictionary["reads"]) if dictionary["reads"] != dictionary["writes"] else ""
    return dictionary["kind"] + (f" from {reads}" if reads else "") + (" with skip" if dictionary["skip"] else "")


def plot_sweep(table: pd.DataFrame, png: Path, size: int = 100) -> Path:
    """Faithfulness at `size` nodes of `sweep_table` against L0 and against FVU, a line of panels for each task and
    site; sites share panels, and their baselines are in the CSV alone, where there are more than 4.

    A color for each site, architecture and sparsifier: errors removed are solid, errors scored dashed. Baselines
    are gray, and level where they are the same beside all dictionaries of a site.
    """
    y = f"faithfulness_at_{size}"
    shown = table.astype({column: float for column in ("l0", "fvu", y)})
    own = shown[shown.cut == "dictionary"]
    for column in ("l0", "fvu"):  # a baseline stands where the dictionary beside it does
        shown[column] = shown.dictionary.map(dict(zip(own.dictionary, own[column], strict=True)))
    shown["label"] = shown.site + ", " + shown.architecture + ", " + shown.sparsifier
    looks = {label: _look(i) for i, label in enumerate(shown.label.dropna().unique())}
    sites = list(shown.site.unique())
    groups = [[site] for site in sites] if len(sites) <= MOST_PANEL_SITES else [sites]
    lines = [
        (task, group, rows)
        for task in shown.task.unique()
        for group in groups
        if len(rows := shown.loc[(shown.task == task) & shown.site.isin(group)])
    ]
    figure, axes = new_figure(2 * len(lines), most_columns=2, margin=2.6)
    for i, (task, group, rows) in enumerate(lines):
        for ax, x in zip(axes[2 * i : 2 * i + 2], AXES, strict=True):
            _draw_sweep(ax, rows, x, y, looks)
            if len(group) == 1:
                _draw_baselines(ax, rows, x, y)
            ax.set_ylabel(f"faithfulness at {size} nodes")
            ax.set_title(", ".join([task, *(group if len(group) == 1 else [])]) + ax.get_title(), fontsize="small")
    legend_beside(figure, _sweep_handles(axes, looks))
    png.parent.mkdir(parents=True, exist_ok=True)
    return save_plot(figure, table, png)


def _draw_sweep(ax: Any, rows: pd.DataFrame, x: str, y: str, looks: Mapping[str, tuple[str, str]]) -> None:
    """The dictionaries of a panel; the title gets a second line where there is something to say."""
    points = rows.loc[rows.label.notna() & rows.errors.isin(list(STYLES))].dropna(subset=[x, y])
    for label, (color, marker) in looks.items():
        for errors, style in STYLES.items():
            line = points.loc[(points.label == label) & (points.errors == errors)].sort_values(by=x)
            if len(line):
                ax.plot(line[x], line[y], color=color, marker=marker, label=label, **style)
    n_outside = int((~points[y].between(LOWEST, HIGHEST)).sum())
    ax.set_ylim(LOWEST, HIGHEST)
    for level in (0, 1):
        ax.axhline(level, color="black", linewidth=0.5, linestyle=":")
    ax.set_xlabel(AXES[x])
    if points.empty:
        ax.set_title("\nno dictionary has these numbers")
        ax.set_xticks([])
        return
    if n_outside:
        ax.set_title(f"\n{n_outside} beyond the axis, see the CSV")
    low, high = float(points[x].min()), float(points[x].max())
    if low > 0 and high > 3 * low:
        ax.set_xscale("log")
        log_ticks(ax.xaxis)
    else:
        margin = 0.2 * abs(high) or 1.0
        ax.set_xlim(low - margin, high + margin)
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))


def _draw_baselines(ax: Any, rows: pd.DataFrame, x: str, y: str) -> None:
    """Those of one site; random dictionaries differ where those beside them differ in L0 or size."""
    for (cut, errors), label in BASELINES.items():
        own = rows.loc[(rows.cut == cut) & (rows.errors == errors)].dropna(subset=[y])
        look = {"color": GRAYS[cut], "linestyle": "--" if errors == "scored" else "-", "linewidth": 1, "zorder": 1}
        if len(values := set(own[y])) == 1:
            ax.axhline(values.pop(), label=label, **look)
        elif len(placed := own.dropna(subset=[x]).sort_values(by=x)):
            ax.plot(placed[x], placed[y], label=label, **look)


def _sweep_handles(axes: list[Any], looks: Mapping[str, tuple[str, str]]) -> list[Line2D]:
    """Colors, then what solid and dashed are, then the baselines that were drawn."""
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=4, label=textwrap.fill(label, LABEL))
        for label, (color, marker) in looks.items()
    ]
    handles += [
        Line2D([], [], color="black", marker="o", label=f"errors {errors}", **style)
        for errors, style in STYLES.items()
    ]
    drawn = {line.get_label(): line for ax in axes for line in ax.lines}
    return handles + [drawn[label] for label in BASELINES.values() if label in drawn]


def _look(i: int) -> tuple[str, str]:
    """Color and marker of the i-th kind of dictionaries."""
    return COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]

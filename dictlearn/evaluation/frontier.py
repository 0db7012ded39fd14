"""The frontier of a sweep: few active latents against a good reconstruction."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from dictlearn.evaluation.plots import COLORS, LEGEND, legend_beside, log_ticks, new_figure, save_plot

MOST_PANEL_SITES = 4  # more share one pair of panels
PANELS = {"fvu": "FVU", "delta_ce": "delta CE, nats per token"}
MARKERS = "os^DvPX*"
LABEL = 36
LEAST_STEP = 1.15  # factor between two ticks that can both be read


def on_frontier(x: Iterable[float], y: Iterable[float]) -> np.ndarray:
    """Which points no other one dominates: at most as large in both, smaller in one. NaN is not on the frontier."""
    a, b = np.array(list(x), float), np.array(list(y), float)
    keep = np.zeros(len(a), bool)
    least = np.inf  # of b among all smaller a
    for value in np.unique(a[~np.isnan(a) & ~np.isnan(b)]):
        here = np.flatnonzero((a == value) & ~np.isnan(b))
        lowest = b[here].min()
        if lowest < least:
            keep[here[b[here] == lowest]] = True
            least = lowest
    return keep


def plot_frontier(table: pd.DataFrame, swept: Sequence[str], png: Path) -> Path:
    """L0 (log) against FVU and delta CE: a pair of panels for each write site. Sites share one pair where there are
    more than 4 of them, or a single dictionary at each.

    Colours and markers tell the values of the keys `swept` that L0 does not show, and sites that share a panel. The
    line joins the dictionaries of a site on the frontier of L0 and what the panel shows. A ring marks those whose
    value of a swept key is an end of its range.
    """
    sites = list(table.groupby("site", sort=False))
    together = len(sites) > MOST_PANEL_SITES or (len(sites) > 1 and len(sites) == len(table))
    on_axis = [key for key in swept if key.startswith("sparsifier.") and is_number(pd.Series(table[key]))]
    labels = _labels(table, [key for key in swept if key not in on_axis], with_site=together)
    looks = {label: _look(i) for i, label in enumerate(dict.fromkeys(labels))}
    figure, axes = new_figure(2 if together else 2 * len(sites), most_columns=2, margin=LEGEND)
    for i, (site, rows) in enumerate(sites):
        pair = axes[:2] if together else axes[2 * i : 2 * i + 2]
        for ax, (column, axis_label) in zip(pair, PANELS.items(), strict=True):
            _draw(ax, rows, column, labels, looks, on_axis)
            ax.set_xlabel("L0, active latents per token")
            ax.set_ylabel(axis_label)
            ax.set_title("all sites" if together else str(site), fontsize="small")
    for ax in axes:
        _log_axis(ax, table.l0)
    handles = [
        Line2D([], [], linestyle="", color=color, marker=marker, label=label)
        for label, (color, marker) in looks.items()
    ]
    if any(ax.lines for ax in axes):
        handles.append(Line2D([], [], color="gray", linewidth=1, label="frontier"))
    if (table.edge != "").any():
        ring = {"markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
        handles.append(Line2D([], [], linestyle="", marker="o", label="at the edge of the swept range", **ring))
    legend_beside(figure, handles)
    return save_plot(figure, table, png)


def _draw(
    ax: Any,
    rows: pd.DataFrame,
    column: str,
    labels: pd.Series,
    looks: dict[str, tuple[str, str]],
    on_axis: Sequence[str],
) -> None:
    """The dictionaries of one site."""
    shown = rows.dropna(subset=["l0", column]).query("l0 > 0")  # a log axis has no 0
    for label, points in shown.groupby(labels[shown.index], sort=False):
        color, marker = looks[str(label)]
        ax.scatter(points.l0, points[column], s=18, color=color, marker=marker, zorder=2)
    line = shown.loc[on_frontier(shown.l0, shown[column])].sort_values(by="l0")
    if len(line) > 1:
        own = set(labels[rows.index])
        color = looks[own.pop()][0] if len(own) == 1 else "gray"
        ax.plot(line.l0, line[column], linewidth=1, color=color, zorder=1)
    ends = shown.query("edge != ''")
    ax.scatter(ends.l0, ends[column], s=80, facecolors="none", edgecolors="black", linewidths=0.8)
    for _, row in shown.iterrows():
        own = [f"{short_name(key, on_axis)} {row[key]:g}" for key in on_axis if _differs(row[key], row.l0)]
        ax.annotate(", ".join(own), (row.l0, row[column]), (5, 4), textcoords="offset points", fontsize="xx-small")


def _differs(value: Any, l0: float) -> bool:
    """Whether a sparsifier's value says more than the L0 it leads to, as the k of TopK does not."""
    return not _is_missing(value) and abs(value - l0) > 0.2 * l0


def _labels(table: pd.DataFrame, keys: Sequence[str], with_site: bool) -> pd.Series:
    """What is said of each dictionary in the legend, in lines of LABEL letters."""
    labels = []
    for _, row in table.iterrows():
        parts = [str(row.site)] if with_site else []
        parts += [f"{short_name(key, keys)} {_text(row[key])}" for key in keys if not _is_missing(row[key])]
        labels.append(textwrap.fill(", ".join(parts) or "dictionary", LABEL))
    return pd.Series(labels, index=table.index)


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).rpartition(".")[2]  # of a path to a class


def short_name(key: str, keys: Iterable[str]) -> str:
    """The last part of a dotted key that is not `_target_`; all of it where another of `keys` ends alike."""
    own = _last(key)
    return key if sum(_last(other) == own for other in keys) > 1 else own


def _last(key: str) -> str:
    return key.removesuffix("._target_").rpartition(".")[2]


def _look(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th kind of points: 80 different ones."""
    return COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)]


def is_number(values: pd.Series) -> bool:
    return is_numeric_dtype(values) and not is_bool_dtype(values)


def _log_axis(ax: Any, l0: pd.Series) -> None:
    """Ticks at the L0s where these are few, as in a sweep of k; else at 1, 2, 5, 10 ..."""
    found = sorted(
        {float(round(value)) if value >= 10 else float(f"{value:.2g}") for value in l0.dropna() if value > 0}
    )
    if not found:
        return
    ax.set_xscale("log")
    ax.set_xlim(found[0] / 1.5, found[-1] * 1.5)
    steps = [b / a for a, b in itertools.pairwise(found)]
    log_ticks(ax.xaxis, found if len(found) <= 8 and min(steps, default=2.0) > LEAST_STEP else None)

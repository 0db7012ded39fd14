"""Plots of reports and of training, each PNG with the CSV it is drawn from under the same stem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

WIDTH, HEIGHT = 4.5, 3.0  # inches of one panel
COLORS = tuple(f"C{i}" for i in range(10))
LINES = ("-", "--", ":", "-.")
MOST_BARS = 100
LEGEND, LEGEND_LINE = 2.0, 0.165  # inches: width, height of a line


def plot_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """`<dictionary>_density`, `_l0`, `_fvu_per_position` and `_ce_per_position`, where the report has the numbers;
    returns the PNGs.
    """
    plots: dict[str, tuple[str, Callable[[Mapping[str, Any], Path], Path]]] = {
        "density": ("histograms", plot_density),
        "l0": ("histograms", plot_l0),
        "fvu_per_position": ("reconstruction", plot_fvu_per_position),
        "ce_per_position": ("behaviour", plot_ce_per_position),
    }
    found = {stem: plot for stem, (section, plot) in plots.items() if section in report}
    if found:
        folder.mkdir(parents=True, exist_ok=True)
    name = report["dictionary"]["name"]
    return [plot(report, folder / f"{name}_{stem}.png") for stem, plot in found.items()]


def plot_density(report: Mapping[str, Any], png: Path) -> Path:
    """How many latents fire on which share of the held-out tokens, log10; dead latents in the title."""
    table = pd.DataFrame(report["histograms"]["density"])
    sparsity = report["sparsity"]
    figure, axes = new_figure(1)
    axes[0].bar(table.log10_low, table.n_latents, width=table.log10_high - table.log10_low, align="edge")
    occupied = table[table.n_latents > 0]
    if len(occupied):
        axes[0].set_xlim(occupied.log10_low.min() - 0.2, 0.1)
    axes[0].set_xlabel("log10 of the share of tokens a latent fires on")
    axes[0].set_ylabel("latents")
    name, n_dead, n_tokens = report["dictionary"]["name"], sparsity["n_dead"], sparsity["n_tokens"]
    axes[0].set_title(f"{name}: {n_dead} dead on {n_tokens:,} tokens", fontsize="small")
    return save_plot(figure, table, png)


def plot_l0(report: Mapping[str, Any], png: Path) -> Path:
    """How many tokens have which number of active latents; wide ranges in at most 100 bars."""
    table = pd.DataFrame(report["histograms"]["l0"])
    l0 = report["sparsity"]["l0"]
    low, high = int(table.l0.min()), int(table.l0.max())
    width = math.ceil((high - low + 1) / MOST_BARS)
    figure, (ax,) = new_figure(1)
    ax.hist(table.l0, np.arange(low - 0.5, high + width, width), weights=table.n_tokens, rwidth=0.9)
    margin = max(5, 0.05 * (high - low))  # so that the one bar of TopK is a bar
    ax.set_xlim(max(low - margin, -1), high + margin)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("active latents of a token (L0)")
    ax.set_ylabel("tokens" if width == 1 else f"tokens, in bars of {width} values")
    title = f"{report['dictionary']['name']}: mean {l0['mean']:.1f}, median {l0['median']:g}"
    ax.set_title(title, fontsize="small")
    return save_plot(figure, table, png)


def plot_fvu_per_position(report: Mapping[str, Any], png: Path) -> Path:
    """FVU of the tokens at each position; a gap where none is counted."""
    section = report["reconstruction"]
    table = pd.DataFrame({"fvu": section["fvu_per_position"], "n_tokens": section["n_tokens_per_position"]})
    table.insert(0, "position", range(len(table)))
    figure, (ax,) = new_figure(1)
    ax.plot(table.position, table.fvu.astype(float), marker=".", markersize=3, linewidth=1)
    if section["fvu"] is not None:
        ax.axhline(section["fvu"], color="gray", linewidth=1, linestyle="--", label="all positions")
        ax.legend(fontsize="x-small")
    ax.set_xlabel("position in the row")
    ax.set_ylabel("FVU")
    ax.set_ylim(bottom=0)
    ax.set_title(report["dictionary"]["name"], fontsize="small")
    return save_plot(figure, table, png)


def plot_ce_per_position(report: Mapping[str, Any], png: Path) -> Path:
    """Cross-entropy of the prediction made at each position: clean, with the reconstruction, and their difference.

    The CSV has the ablations as well, whose nats would leave no difference to be seen.
    """
    section = report["behaviour"]
    table = pd.DataFrame({**section["ce_per_position"], "n_tokens": section["n_tokens_per_position"]}, dtype=float)
    table.insert(0, "position", range(len(table)))
    table["delta"] = table.rec - table.clean
    line = {"marker": ".", "markersize": 3, "linewidth": 1}
    figure, (both, delta) = new_figure(2)
    for column, label in {"rec": "reconstruction", "clean": "clean"}.items():
        both.plot(table.position, table[column], label=label, **line)
    both.set_ylabel("CE of the next token, nats")
    delta.plot(table.position, table.delta, color="C2", **line)
    delta.axhline(0, color="black", linewidth=0.5)
    delta.set_ylabel("delta CE, nats")
    if section["delta_ce"] is not None:
        delta.axhline(section["delta_ce"], color="gray", linewidth=1, linestyle="--", label="all positions")
        delta.legend(fontsize="x-small")
    both.legend(fontsize="x-small")
    for ax in (both, delta):
        ax.set_xlabel("position in the row")
        ax.set_title(report["dictionary"]["name"], fontsize="small")
    return save_plot(figure, table.astype({"n_tokens": int}), png)


def plot_training(metrics_csv: Path, folder: Path) -> Path | None:
    """`training`: a panel per metric and a line per dictionary over the tokens trained on.

    `metrics_csv` has the columns `n_tokens`, `step` and `<dictionary>/<metric>`; cells may be empty. None where it
    has no such column.
    """
    log = pd.read_csv(metrics_csv)
    names = [column for column in log.columns if "/" in column]
    if not names:
        return None
    table = log.melt(["step", "n_tokens"], names).dropna()
    table[["dictionary", "metric"]] = table.pop("variable").str.rsplit("/", n=1, expand=True)
    metrics = list(dict.fromkeys(table.metric))
    looks = {name: (COLORS[i % 10], LINES[i // 10 % 4]) for i, name in enumerate(dict.fromkeys(table.dictionary))}
    figure, axes = new_figure(len(metrics), margin=LEGEND)
    for ax, metric in zip(axes, metrics, strict=True):
        own = table[table.metric == metric]
        for name, (color, style) in looks.items():
            line = own.query("dictionary == @name")
            ax.plot(line.n_tokens, line.value, color=color, linestyle=style, label=name)
        ax.set_xlabel("tokens")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_title(metric, fontsize="small")
        if own.value.min() > 0 and own.value.max() > 3 * own.value.min():
            ax.set_yscale("log")
            log_ticks(ax.yaxis)
    legend_beside(figure, axes[0].lines)
    folder.mkdir(parents=True, exist_ok=True)
    return save_plot(figure, table, folder / "training.png")


def new_figure(n_panels: int, most_columns: int = 3, margin: float = 0.0) -> tuple[Figure, list[Any]]:
    """A figure and its panels, in lines of at most `most_columns` that all fill the width; `margin` inches more for
    a legend beside them.
    """
    n_lines = math.ceil(n_panels / most_columns)
    in_line = [n_panels // n_lines + (line < n_panels % n_lines) for line in range(n_lines)]
    figure = Figure(figsize=(WIDTH * in_line[0] + margin, HEIGHT * n_lines), layout="constrained")
    grid = figure.add_gridspec(n_lines, math.lcm(*in_line))
    axes = []
    for line, n in enumerate(in_line):
        span = grid.ncols // n
        axes += [figure.add_subplot(grid[line, i * span : (i + 1) * span]) for i in range(n)]
    return figure, axes


def legend_beside(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend to the right of all panels; the figure grows where it is taller than they are."""
    n_lines = sum(str(handle.get_label()).count("\n") + 1 for handle in handles)
    figure.set_figheight(max(figure.get_figheight(), 0.2 + LEGEND_LINE * n_lines))
    figure.legend(handles=handles, loc="outside right upper", fontsize="x-small")


def log_ticks(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Plain numbers on a log axis: at `ticks`, or at 1, 2, 5, 10 ..."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if ticks is None else FixedLocator(list(ticks)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())
    if ticks is not None:
        axis.set_minor_locator(NullLocator())


def save_plot(figure: Figure, table: pd.DataFrame, png: Path) -> Path:
    """Write the PNG, and the table it is drawn from as a CSV under the same stem."""
    table.to_csv(png.with_name(f"{png.stem}.csv"), index=False)
    figure.savefig(png, dpi=120)
    return png

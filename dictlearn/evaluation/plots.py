"""Plots of reports and of training, each PNG with the CSV it is drawn from under the same stem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.5, 3.0  # inches of one panel


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
    """How many tokens have which number of active latents."""
    table = pd.DataFrame(report["histograms"]["l0"])
    l0 = report["sparsity"]["l0"]
    figure, axes = new_figure(1)
    axes[0].bar(table.l0, table.n_tokens, width=1.0)
    axes[0].set_xlabel("active latents of a token (L0)")
    axes[0].set_ylabel("tokens")
    title = f"{report['dictionary']['name']}: mean {l0['mean']:.1f}, median {l0['median']:g}"
    axes[0].set_title(title, fontsize="small")
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
    """Cross-entropy of the prediction made at each position: clean, reconstructed, mean-ablated (and, in the CSV
    alone, zero-ablated).
    """
    section = report["behaviour"]
    table = pd.DataFrame({**section["ce_per_position"], "n_tokens": section["n_tokens_per_position"]})
    table.insert(0, "position", range(len(table)))
    figure, (ax,) = new_figure(1)
    for column, label in {"mean": "mean ablation", "rec": "reconstruction", "clean": "clean"}.items():
        ax.plot(table.position, table[column].astype(float), marker=".", markersize=3, linewidth=1, label=label)
    ax.legend(fontsize="x-small")
    ax.set_xlabel("position in the row")
    ax.set_ylabel("cross-entropy of the next token, nats")
    ax.set_title(report["dictionary"]["name"], fontsize="small")
    return save_plot(figure, table, png)


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
    figure, axes = new_figure(len(metrics))
    for ax, metric in zip(axes, metrics, strict=True):
        for name, line in table[table.metric == metric].groupby("dictionary", sort=False):
            ax.plot(line.n_tokens, line.value, label=str(name))
        ax.set_xlabel("tokens")
        ax.set_title(metric, fontsize="small")
        values = table.value[table.metric == metric]
        if values.min() > 0 and values.max() > 3 * values.min():
            ax.set_yscale("log")
    axes[0].legend(fontsize="x-small")
    folder.mkdir(parents=True, exist_ok=True)
    return save_plot(figure, table, folder / "training.png")


def new_figure(n_panels: int, most_columns: int = 3) -> tuple[Figure, list[Any]]:
    """A figure and its panels, in lines of at most `most_columns`."""
    n_columns = min(n_panels, most_columns)
    n_lines = math.ceil(n_panels / n_columns)
    figure = Figure(figsize=(WIDTH * n_columns, HEIGHT * n_lines), layout="constrained")
    grid = figure.subplots(n_lines, n_columns, squeeze=False).flatten().tolist()
    for ax in grid[n_panels:]:
        ax.remove()
    return figure, grid[:n_panels]


def save_plot(figure: Figure, table: pd.DataFrame, png: Path) -> Path:
    """Write the PNG, and the table it is drawn from as a CSV under the same stem."""
    table.to_csv(png.with_name(f"{png.stem}.csv"), index=False)
    figure.savefig(png, dpi=120)
    return png

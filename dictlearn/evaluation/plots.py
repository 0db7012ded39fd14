"""Plots of reports and of training, each PNG with the CSV it is drawn from under the same stem."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.5, 3.0  # inches of one panel


def plot_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """`<dictionary>_density` and `<dictionary>_l0`, where the report has histograms; the PNGs written."""
    if "histograms" not in report:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    name = report["dictionary"]["name"]
    return [
        plot_density(report, folder / f"{name}_density.png"),
        plot_l0(report, folder / f"{name}_l0.png"),
    ]


def plot_density(report: Mapping[str, Any], png: Path) -> Path:
    """How many latents fire on which share of the held-out tokens, log10; dead latents in the title."""
    table = pd.DataFrame(report["histograms"]["density"])
    sparsity = report["sparsity"]
    figure, axes = _figure(1)
    axes[0].bar(table.log10_low, table.n_latents, width=table.log10_high - table.log10_low, align="edge")
    occupied = table[table.n_latents > 0]
    if len(occupied):
        axes[0].set_xlim(occupied.log10_low.min() - 0.2, 0.1)
    axes[0].set_xlabel("log10 of the share of tokens a latent fires on")
    axes[0].set_ylabel("latents")
    name, n_dead, n_tokens = report["dictionary"]["name"], sparsity["n_dead"], sparsity["n_tokens"]
    axes[0].set_title(f"{name}: {n_dead} dead on {n_tokens:,} tokens", fontsize="small")
    return _save(figure, table, png)


def plot_l0(report: Mapping[str, Any], png: Path) -> Path:
    """How many tokens have which number of active latents."""
    table = pd.DataFrame(report["histograms"]["l0"])
    l0 = report["sparsity"]["l0"]
    figure, axes = _figure(1)
    axes[0].bar(table.l0, table.n_tokens, width=1.0)
    axes[0].set_xlabel("active latents of a token (L0)")
    axes[0].set_ylabel("tokens")
    title = f"{report['dictionary']['name']}: mean {l0['mean']:.1f}, median {l0['median']:g}"
    axes[0].set_title(title, fontsize="small")
    return _save(figure, table, png)


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
    figure, axes = _figure(len(metrics))
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
    return _save(figure, table, folder / "training.png")


def _figure(n_panels: int) -> tuple[Figure, list[Any]]:
    n_columns = min(n_panels, 3)
    n_lines = math.ceil(n_panels / n_columns)
    figure = Figure(figsize=(WIDTH * n_columns, HEIGHT * n_lines), layout="constrained")
    grid = figure.subplots(n_lines, n_columns, squeeze=False).flatten().tolist()
    for ax in grid[n_panels:]:
        ax.remove()
    return figure, grid[:n_panels]


def _save(figure: Figure, table: pd.DataFrame, png: Path) -> Path:
    table.to_csv(png.with_name(f"{png.stem}.csv"), index=False)
    figure.savefig(png, dpi=120)
    return png

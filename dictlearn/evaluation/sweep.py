"""A sweep in one table: what was varied, what came out, who is on the frontier and whose range was too small."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from dictlearn.evaluation.plots import new_figure, save_plot
from dictlearn.evaluation.report import value_at, write_whole

Report = Mapping[str, Any]
RESULTS = {  # column -> where in a report
    "l0": "sparsity.l0.mean",
    "fvu": "reconstruction.fvu",
    "delta_ce": "behaviour.delta_ce",
    "ce_recovered_zero": "behaviour.ce_recovered_zero",
    "ce_recovered_mean": "behaviour.ce_recovered_mean",
    "kl_rec": "behaviour.kl_rec",
    "frac_dead": "sparsity.frac_dead",
    "n_tokens": "data.n_counted",
}
LEAST_VALUES = 3  # of a swept key that has an inside
MOST_PANEL_SITES = 4  # more share one pair of panels, a colour each
PANELS = {"fvu": "FVU", "delta_ce": "delta CE, nats per token"}


def sweep_table(points: Mapping[str, Mapping[str, Any]], reports: Mapping[str, Report]) -> pd.DataFrame:
    """One row per dictionary of `points`, in their order.

    Args:
        points: dictionary name -> `{"site": site, swept key: value, ...}`.
        reports: report by dictionary name. What a report does not have is missing in the table.

    Columns: `dictionary`; `site`, where it writes (several joined by "+"); the swept keys; those of RESULTS
    (`n_tokens`: counted held-out tokens); `on_frontier`, whether no other dictionary of the same site is as good in
    both L0 and FVU and better in one; `edge`, the swept keys whose value is an end of the swept range,
    "sparsifier.k:max", separated by spaces: a better dictionary may lie outside of it. Only keys with numbers, at
    least 3 different ones.
    """
    swept = list(dict.fromkeys(key for point in points.values() for key in point if key != "site"))
    rows = []
    for name, point in points.items():
        report = reports.get(name, {})
        writes = report.get("dictionary", {}).get("writes") or [point.get("site")]
        found = {column: value_at(report, path) for column, path in RESULTS.items()}
        rows.append(
            {
                "dictionary": name,
                "site": "+".join(map(str, writes)),
                **{key: point.get(key) for key in swept},
                **found,
            }
        )
    table = pd.DataFrame(rows, columns=["dictionary", "site", *swept, *RESULTS])
    table = table.astype(dict.fromkeys(RESULTS, float) | {"n_tokens": "Int64"})
    table[swept] = table[swept].convert_dtypes()  # whole numbers stay whole where a dictionary lacks the key
    table["on_frontier"] = False
    for _, same_site in table.groupby("site"):
        table.loc[same_site.index, "on_frontier"] = on_frontier(same_site.l0, same_site.fvu)
    table["edge"] = _edges(table, swept)
    return table


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


def _edges(table: pd.DataFrame, swept: Sequence[str]) -> list[str]:
    found: list[list[str]] = [[] for _ in range(len(table))]
    for key in swept:
        values = pd.Series(table[key])
        if is_bool_dtype(values) or not is_numeric_dtype(values) or values.nunique() < LEAST_VALUES:
            continue
        for end, extreme in (("min", values.min()), ("max", values.max())):
            for row in np.flatnonzero((values == extreme).fillna(False)):
                found[row].append(f"{key}:{end}")
    return [" ".join(keys) for keys in found]


def write_sweep(table: pd.DataFrame, run_dir: Path) -> None:
    """Write `run_dir/sweep.csv`, and `plots/frontier.png` with its CSV where a dictionary has an L0 and an FVU."""
    write_whole(run_dir / "sweep.csv", lambda file: table.to_csv(file, index=False))
    if (table.l0.notna() & table.fvu.notna()).any():
        (run_dir / "plots").mkdir(parents=True, exist_ok=True)
        plot_frontier(table, run_dir / "plots" / "frontier.png")


def plot_frontier(table: pd.DataFrame, png: Path) -> Path:
    """L0 (log) against FVU and delta CE: a pair of panels per write site; more than 4 sites share one, in colours.

    The line joins the dictionaries on the frontier of L0 and what the panel shows. A ring marks those whose value
    of a swept key is an end of its range.
    """
    by_site = list(table.groupby("site", sort=False))
    together = len(by_site) > MOST_PANEL_SITES
    figure, axes = new_figure(2 if together else 2 * len(by_site), most_columns=2)
    for i, (site, rows) in enumerate(by_site):
        pair = axes[:2] if together else axes[2 * i : 2 * i + 2]
        for ax, (column, label) in zip(pair, PANELS.items(), strict=True):
            _draw(ax, rows, column, label=str(site) if together else None, color=f"C{i}")
            ax.set_xlabel("L0, active latents per token")
            ax.set_ylabel(label)
            ax.set_title("all sites" if together else str(site), fontsize="small")
    for ax in axes:
        if ax.has_data():
            ax.set_xscale("log")
            handles, labels = ax.get_legend_handles_labels()
            unique = dict(zip(labels, handles, strict=True))  # the ring once
            ax.legend(unique.values(), unique.keys(), fontsize="x-small")
    return save_plot(figure, table, png)


def _draw(ax: Any, rows: pd.DataFrame, column: str, label: str | None, color: str) -> None:
    shown = rows.dropna(subset=["l0", column]).query("l0 > 0")  # a log axis has no 0
    if shown.empty:
        return
    ax.scatter(shown.l0, shown[column], s=14, color=color, label=label or "dictionary")
    line = shown.loc[on_frontier(shown.l0, shown[column])].sort_values(by="l0")
    ax.plot(line.l0, line[column], linewidth=1, color=color, label=None if label else "frontier")
    ends = shown.query("edge != ''")
    if len(ends):
        keys = sorted({word for words in ends.edge for word in words.split()})
        ring = f"end of a swept range ({', '.join(keys)})"
        ax.scatter(ends.l0, ends[column], s=70, facecolors="none", edgecolors="black", linewidths=0.8, label=ring)

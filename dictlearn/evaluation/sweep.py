"""A sweep in one table: what was varied, what came out, who is on the frontier and whose range was too small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dictlearn.evaluation.frontier import is_number, on_frontier, plot_frontier
from dictlearn.evaluation.report import value_at, write_whole
from dictlearn.types import DictlearnError

Report = Mapping[str, Any]
RESULTS = {  # column -> where in a report
    "l0": "sparsity.l0.mean",
    "fvu": "reconstruction.fvu",
    "delta_ce": "behaviour.delta_ce",
    "ce_recovered_zero": "behaviour.ce_recovered_zero",
    "ce_recovered_mean": "behaviour.ce_recovered_mean",
    "kl_rec": "behaviour.kl_rec",
    "frac_dead": "sparsity.frac_dead",
    "heldout_n_tokens": "data.n_counted",
}
LEAST_VALUES = 3  # of a swept key that has an inside
MEASURED = ("dictionary", "site", *RESULTS, "on_frontier", "edge")  # no swept key has such a name


def sweep_table(points: Mapping[str, Mapping[str, Any]], reports: Mapping[str, Report]) -> pd.DataFrame:
    """One row per dictionary of `points`, in their order.

    Args:
        points: dictionary name -> `{"site": site, swept key: value, ...}`.
        reports: report by dictionary name. What a report does not have is missing in the table.

    Columns: `dictionary`; `site`, where it writes (several joined by "+"); the swept keys; those of RESULTS
    (`heldout_n_tokens`: counted held-out tokens); `on_frontier`, whether no other dictionary of the same site is as
    good in both L0 and FVU and better in one; `edge`, the swept keys whose value is an end of the swept range,
    "sparsifier.k:max", separated by spaces: a better dictionary may lie outside of it. Only keys with numbers, at
    least 3 different ones.

    Raises DictlearnError for a swept key that has the name of another column.
    """
    swept = list(dict.fromkeys(key for point in points.values() for key in point if key != "site"))
    if clash := sorted(set(swept) & set(MEASURED)):
        raise DictlearnError(f"A swept key must not have the name of a column of the table: {', '.join(clash)}.")
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
    table = table.astype(dict.fromkeys(RESULTS, float) | {"heldout_n_tokens": "Int64"})
    table[swept] = table[swept].convert_dtypes()  # whole numbers stay whole where a dictionary lacks the key
    table["on_frontier"] = False
    for _, same_site in table.groupby("site"):
        table.loc[same_site.index, "on_frontier"] = on_frontier(same_site.l0, same_site.fvu)
    table["edge"] = _edges(table, swept)
    return table


def _edges(table: pd.DataFrame, swept: Sequence[str]) -> list[str]:
    found: list[list[str]] = [[] for _ in range(len(table))]
    for key in swept:
        values = pd.Series(table[key])
        if not is_number(values) or values.nunique() < LEAST_VALUES:
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
        swept = [column for column in table.columns if column not in MEASURED]
        plot_frontier(table, swept, run_dir / "plots" / "frontier.png")

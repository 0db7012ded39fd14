"""The reports of several dictionaries as one table, a row each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dictlearn.evaluation.report import value_at

COLUMNS = {  # header -> where in the report, format; with a name of 12 letters the table is 80 wide
    "L0": ("sparsity.l0.mean", ".1f"),
    "dead": ("sparsity.frac_dead", ".1%"),
    "FVU": ("reconstruction.fvu", ".4f"),
    "cosine": ("reconstruction.cosine", ".3f"),
    "delta\nCE": ("behaviour.delta_ce", ".4f"),
    "CE rec.\n(zero)": ("behaviour.ce_recovered_zero", ".4f"),
    "CE rec.\n(mean)": ("behaviour.ce_recovered_mean", ".4f"),
    "KL": ("behaviour.kl_rec", ".4f"),
}


def report_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per dictionary; `-` for what is null or was not computed."""
    table = Table(title=_title(reports), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("dictionary", overflow="fold")
    for header in COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    for name, report in reports.items():
        table.add_row(name, *[_cell(report, path, spec) for path, spec in COLUMNS.values()])
    return table


def _title(reports: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(reports.values()))
    clean = _cell(first, "behaviour.ce_clean", ".4f")
    return f"{first['data']['n_counted']:,} held-out tokens, clean CE {clean} nats"


def _cell(report: Mapping[str, Any], path: str, spec: str) -> str:
    value = value_at(report, path)
    return "-" if value is None else format(value, spec)

"""The reports of several dictionaries as one table, a row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
PLANTED_COLUMNS = {  # of planted activations, which have no behaviour
    **{header: column for header, column in COLUMNS.items() if not column[0].startswith("behaviour.")},
    "true\nL0": ("ground_truth.true_l0", ".1f"),
    "features\nmatched": ("ground_truth.frac_matched", ".1%"),
    "preci-\nsion": ("ground_truth.precision", ".3f"),
    "recall": ("ground_truth.recall", ".3f"),
    "shrink-\nage": ("ground_truth.shrinkage", ".3f"),
}

MARK = "!"
CAPTION = (
    f"{MARK} outside [0, 1]: the reconstruction does worse than the ablation or better than the LM itself, or the "
    "ablation costs next to nothing; read delta CE"
)


def report_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per dictionary; `-` for what is null or was not computed, `!` after a share outside [0, 1]."""
    columns = PLANTED_COLUMNS if any("ground_truth" in report for report in reports.values()) else COLUMNS
    rows = {name: [_cell(report, *column) for column in columns.values()] for name, report in reports.items()}
    marked = any(cell.endswith(MARK) for cells in rows.values() for cell in cells)
    table = Table(title=_title(list(reports.values())), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = CAPTION if marked else None
    table.add_column("dictionary", overflow="fold")
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _title(reports: Sequence[Mapping[str, Any]]) -> str:
    """Both sets of tokens: behaviour has its own."""
    title = f"{_range(reports, 'data.n_counted', ',')} held-out tokens"
    if any("behaviour" in report for report in reports):
        n_predictions = _range(reports, "behaviour.n_tokens", ",")
        title += f"; CE and KL of {n_predictions} predictions in the first rows, clean CE "
        title += f"{_range(reports, 'behaviour.ce_clean', '.4f')} nats"
    return title


def _range(reports: Sequence[Mapping[str, Any]], path: str, spec: str) -> str:
    """A number of the reports; the least and the largest where a norm filter makes them differ."""
    found = sorted(value for report in reports if (value := value_at(report, path)) is not None)
    return " to ".join(dict.fromkeys(format(value, spec) for value in (found[:1] + found[-1:]))) or "-"


def _cell(report: Mapping[str, Any], path: str, spec: str) -> str:
    value = value_at(report, path)
    if value is None:
        return "-"
    outside = "recovered" in path and not 0 <= value <= 1
    return format(value, spec) + (MARK if outside else "")

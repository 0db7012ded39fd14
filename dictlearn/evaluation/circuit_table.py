"""The section `circuits` of reports as one table: a row for each task, cut and treatment of errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

COLUMNS = {  # header -> number, format; the table is 80 wide
    "nodes\nat .5": ("n_at_0.5", ",.0f"),
    "nodes\nat .8": ("n_at_0.8", ",.0f"),
    "f at\n100": ("faithfulness_at_100", ".2f"),
    "f of\nscored": ("faithfulness_of_candidates", ".2f"),
    "f of\nall": ("faithfulness_of_all", ".2f"),
}
CUTS = ("dictionaries", "neurons", "pca", "random")
CAPTION = (
    "nodes at which faithfulness f reaches .5 and .8 (-: never); f of 100 nodes, of all that have a score, of all. "
    "Errors removed: what latents carry alone"
)


def circuits_table(reports: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """None without circuits. Baselines of several sets, each measured by itself, are in the reports alone."""
    sections = [report["circuits"] for report in reports.values() if "circuits" in report]
    sets = {tuple(section["dictionaries"]): section["tasks"] for section in sections}
    rows = [row for names, tasks in sets.items() for row in _rows(names, tasks, baselines=len(sets) == 1)]
    if not rows:
        return None
    table = Table(title="Circuits", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=CAPTION)
    for header in ("task", "cut", "errors"):
        table.add_column(header, overflow="fold")
    for header in (*COLUMNS, "error\nshare"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _rows(names: tuple[str, ...], tasks: Mapping[str, Any], baselines: bool) -> Iterator[list[str]]:
    title = names[0] if len(names) == 1 else f"{len(names)} dictionaries"
    for task, numbers in tasks.items():
        for cut in CUTS if baselines else CUTS[:1]:
            modes = {mode: found for mode, found in numbers.get(cut, {}).items() if isinstance(found, Mapping)}
            for mode, found in modes.items():
                share = numbers[cut].get("error_share")
                errors = mode if share is not None else "none"
                cells = [_cell(found[key], spec) for key, spec in COLUMNS.values()]
                yield [task, title if cut == CUTS[0] else cut, errors, *cells, _cell(share, ".2f")]


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)

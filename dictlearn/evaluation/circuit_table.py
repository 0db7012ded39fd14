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
    "f of\ncandi-\ndates": ("faithfulness_of_candidates", ".2f"),
    "f of\nall": ("faithfulness_of_all", ".2f"),
}
CUTS = ("dictionaries", "neurons", "pca", "random")
BASELINE_CAPTION = ". Random dictionaries are those beside the site's first dictionary"
CAPTION = (
    "nodes at which faithfulness f reaches .5 and .8 (-: never); f of 100 nodes, of the "
    "candidates (all that have a score), of all. Errors removed: what latents carry alone"
)


def circuits_table(reports: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """None without circuits. Where dictionaries were measured each by itself, the baselines of a site follow its
    dictionaries.
    """
    sites: dict[str, dict[tuple[str, ...], Mapping[str, Any]]] = {}
    for report in reports.values():
        if "circuits" in report:
            names = tuple(report["circuits"]["dictionaries"])
            site = site_of(report) if len(names) == 1 else ""  # all others are one set
            sites.setdefault(site, {})[names] = report["circuits"]["tasks"]
    rows = [row for site, sets in sites.items() for row in _rows(sets, f", {site}" if len(sites) > 1 else "")]
    if not rows:
        return None
    shared = any(len(sets) > 1 for sets in sites.values())
    table = Table(title="Circuits", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = CAPTION + (BASELINE_CAPTION if shared else "")
    for header in ("task", "cut", "errors"):
        table.add_column(header, overflow="fold")
    for header in (*COLUMNS, "error\nshare"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _rows(sets: Mapping[tuple[str, ...], Mapping[str, Any]], site: str) -> Iterator[list[str]]:
    """Those of the sets of one site, by task; `site` is said of baselines."""
    for task in dict.fromkeys(task for tasks in sets.values() for task in tasks):
        measured = {names: tasks[task] for names, tasks in sets.items() if task in tasks}
        for names, numbers in measured.items():
            title = names[0] if len(names) == 1 else f"{len(names)} dictionaries"
            yield from _cut_rows(task, title, numbers, CUTS[0])
        for cut in CUTS[1:]:
            first = next((numbers for numbers in measured.values() if modes_of(numbers, cut)), {})
            yield from _cut_rows(task, cut + site, first, cut)


def _cut_rows(task: str, title: str, numbers: Mapping[str, Any], cut: str) -> Iterator[list[str]]:
    for mode, found in modes_of(numbers, cut).items():
        cells = [_cell(found[key], spec) for key, spec in COLUMNS.values()]
        share = _cell(numbers[cut].get("error_share"), ".2f")
        yield [task, title, errors_of(numbers[cut], mode), *cells, share]


def modes_of(numbers: Mapping[str, Any], cut: str) -> dict[str, Mapping[str, Any]]:
    """The treatments of errors that a cut of a task was measured with."""
    return {mode: found for mode, found in numbers.get(cut, {}).items() if isinstance(found, Mapping)}


def errors_of(cut: Mapping[str, Any], mode: str) -> str:
    """The treatment as it is shown: "none" for a cut that has no errors, which has no share of them either."""
    return mode if "error_share" in cut else "none"


def site_of(report: Mapping[str, Any]) -> str:
    """Where a dictionary writes."""
    return "+".join(report["dictionary"]["writes"])


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)

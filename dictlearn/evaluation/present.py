"""An evaluation as a person sees it: reports, plots and one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from dictlearn.evaluation.circuit_plots import plot_circuits, plot_sweep, sweep_table
from dictlearn.evaluation.circuit_table import circuits_table
from dictlearn.evaluation.context import EvaluationBlock, EvaluationContext
from dictlearn.evaluation.plots import plot_report
from dictlearn.evaluation.run import Results, evaluate
from dictlearn.evaluation.table import report_table


def evaluate_and_show(
    context: EvaluationContext,
    blocks: Mapping[str, EvaluationBlock],
    out_dir_of: Mapping[str, Path],
    plots: Path,
    console: Console,
) -> Results:
    """`evaluate`, then the plots of every report under `plots`, then the table and what failed."""
    results = evaluate(context, blocks, out_dir_of)
    for report in results.reports.values():
        plot_report(report, plots)
    for plot, report in _circuits(results.reports).items():
        plot_circuits(report, plots / plot)
    sweep = sweep_table(results.reports)
    if sweep.dictionary.nunique() > 1:
        plot_sweep(sweep, plots / "circuits_sweep.png")
    if any({"sparsity", "behaviour"} & report.keys() for report in results.reports.values()):
        console.print(report_table(results.reports))
    if (circuits := circuits_table(results.reports)) is not None:
        console.print(circuits)
    for page, graph in {r["graph"]["page"]: r["graph"] for r in results.reports.values() if "graph" in r}.items():
        scores = f"replacement score {graph['replacement']:.3f}, completeness {graph['completeness']:.3f}"
        size = f"{graph['n_kept_latents']} latents and {graph['n_kept_edges']} edges shown"
        console.print(f"Graph: {page} ({scores}; {size})", soft_wrap=True, highlight=False, markup=False)
    warned: dict[str, list[str]] = {}
    for name, report in results.reports.items():
        for warning in report["warnings"]:
            warned.setdefault(warning, []).append(name)
    for warning, names in warned.items():
        console.print(f"{', '.join(names)}: {warning}", style="yellow")
    for error in results.errors:
        console.print(f"FAILED {error}", style="red")
    return results


def _circuits(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Reports with curves to draw, by the name of the plot: one of all dictionaries that were measured together."""
    found = {}
    for name, report in reports.items():
        section = report.get("circuits", {})
        if section.get("tasks"):
            found["circuits.png" if len(section["dictionaries"]) > 1 else f"{name}_circuits.png"] = report
    return found

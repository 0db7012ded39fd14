"""An evaluation as a person sees it: reports, plots and one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from dictlearn.evaluation.circuit_plots import plot_circuits, plot_sweep, sweep_table
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
    for name, report in results.reports.items():
        plot_report(report, plots)
        if report.get("circuits", {}).get("tasks"):
            plot_circuits(report, plots / f"{name}_circuits.png")
    if len(sweep := sweep_table(results.reports)) > 1:
        plot_sweep(sweep, plots / "circuits_sweep.png")
    console.print(report_table(results.reports))
    for name, report in results.reports.items():
        for warning in report["warnings"]:
            console.print(f"{name}: {warning}", style="yellow")
    for error in results.errors:
        console.print(f"FAILED {error}", style="red")
    return results

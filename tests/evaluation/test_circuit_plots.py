"""Plots and tables of the section `circuits`."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from dictlearn.evaluation.circuit_plots import circuit_table, plot_circuits, plot_sweep, sweep_table
from dictlearn.evaluation.circuit_table import circuits_table


def numbers(shift: float) -> dict[str, Any]:
    sizes = [0, 1, 10, 100]
    shares = [0.0, 0.1 + shift, 0.5 + shift, 1.0]
    low, high = ([share + way for share in shares] for way in (-0.1, 0.1))
    curve = {
        "n_nodes": sizes,
        "faithfulness": shares,
        "low": low,
        "high": high,
        "complement_faithfulness": shares[::-1],
    }
    at = {"n_at_0.5": 10.0, "n_at_0.8": None, "faithfulness_at_10": 0.5 + shift, "faithfulness_at_100": 1.0 + shift}
    return at | {"faithfulness_of_candidates": 0.75, "faithfulness_of_all": 1.0, "curve": curve}


def report(name: str, together: list[str], l0: float, shift: float = 0.0) -> dict[str, Any]:
    task = {"accuracy": 1.0, "dictionaries": {"scored": numbers(shift), "kept": numbers(0.2)}}
    task["dictionaries"]["error_share"] = 0.25
    task["neurons"] = {"scored": numbers(-0.1)}
    return {
        "dictionary": {"name": name, "sparsifier": {"kind": "top_k"}},
        "sparsity": {"l0": {"mean": l0}},
        "reconstruction": {"fvu": 1 / l0},
        "circuits": {"dictionaries": together, "tasks": {"ioi": task, "successor": task}},
    }


def test_the_table_has_every_point_of_every_curve(tmp_path: Path) -> None:
    own = report("a", ["a", "b"], 8)
    table = circuit_table(own)
    assert len(table) == 2 * 3 * 4
    chosen = table[(table.task == "ioi") & (table.cut == "dictionaries") & (table.errors == "kept")]
    assert chosen.faithfulness.tolist() == [0.0, pytest.approx(0.3), 0.7, 1.0]
    png = plot_circuits(own, tmp_path / "plots" / "a_circuits.png")
    assert png.stat().st_size > 5_000
    assert len(pd.read_csv(tmp_path / "plots" / "a_circuits.csv")) == len(table)


def test_a_sweep_is_of_dictionaries_measured_alone(tmp_path: Path) -> None:
    reports = {
        "k8": report("k8", ["k8"], 8),
        "k16": report("k16", ["k16"], 16, 0.1),
        "x": report("x", ["x", "y"], 4),
    }
    table = sweep_table(reports)
    assert table.dictionary.tolist() == ["k8", "k8", "k16", "k16"]
    assert table.l0.tolist() == [8, 8, 16, 16]
    assert table.fvu.tolist() == [1 / 8, 1 / 8, 1 / 16, 1 / 16]
    assert table["faithfulness_at_100"].tolist() == [1.0, 1.0, 1.1, 1.1]
    assert "curve" not in table
    assert plot_sweep(table, tmp_path / "new" / "sweep.png").exists()
    assert len(sweep_table({"x": reports["x"]})) == 0


def lines_of(reports: dict[str, Any]) -> list[list[str]]:
    table, console = circuits_table(reports), Console(record=True, width=80, file=StringIO())
    assert table is not None
    console.print(table)
    return [line.split() for line in console.export_text().splitlines() if "ioi" in line or "successor" in line]


def test_the_closing_table() -> None:
    """One set of dictionaries beside its baselines; of several sets, the dictionaries alone."""
    together = {name: report(name, ["a", "b"], 8) for name in "ab"}
    lines = lines_of(together)
    assert lines[0] == ["ioi", "2", "dictionaries", "scored", "10", "-", "1.00", "0.75", "1.00", "0.25"]
    assert lines[1] == ["ioi", "2", "dictionaries", "kept", "10", "-", "1.20", "0.75", "1.00", "0.25"]
    assert lines[2] == ["ioi", "neurons", "none", "10", "-", "0.90", "0.75", "1.00", "-"]
    assert [line[0] for line in lines] == ["ioi"] * 3 + ["successor"] * 3
    apart = lines_of({"k8": report("k8", ["k8"], 8), "k16": report("k16", ["k16"], 16, 0.1)})
    assert [line[1] for line in apart] == ["k8"] * 4 + ["k16"] * 4
    assert circuits_table({"a": {"sparsity": {}}}) is None

"""Plots and tables of the section `circuits`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter
from rich.console import Console

from dictlearn.evaluation import circuit_plots
from dictlearn.evaluation.circuit_plots import circuit_table, plot_circuits, plot_sweep, sweep_table
from dictlearn.evaluation.circuit_table import circuits_table

MODES = ("scored", "kept", "removed")


def numbers(start: float) -> dict[str, Any]:
    """A summary whose every number is another one, above `start`, and a curve."""
    shares = [0.0, start / 10, start / 5, start]
    low, high = ([share + way for share in shares] for way in (-0.1, 0.1))
    curve = {
        "n_nodes": [0, 1, 10, 100],
        "faithfulness": shares,
        "low": low,
        "high": high,
        "complement_faithfulness": shares[::-1],
    }
    keys = ("cpr", "n_at_0.5", "n_at_0.8", "n_at_0.95", "faithfulness_of_none", "faithfulness_of_candidates")
    keys += ("faithfulness_of_all", "faithfulness_at_10", "faithfulness_at_100", "faithfulness_at_1000")
    found: dict[str, Any] = {key: start + place / 100 for place, key in enumerate(keys, start=1)}
    return found | {"n_at_0.5": start * 1000 + 5, "n_at_0.8": start * 1000 + 8, "curve": curve}


def cut(starts: Iterator[float], exact: bool = False) -> dict[str, Any]:
    modes = {mode: numbers(next(starts)) for mode in (MODES[:1] if exact else MODES)}
    return modes if exact else {"error_share": next(starts), **modes}


def report(name: str, together: list[str], l0: float = 8.0, fvu: float = 0.1, start: float = 0.1) -> dict[str, Any]:
    """A report whose numbers all differ, those of cuts 0.1 apart."""
    starts = itertools.count(start, 0.1)
    tasks = {
        task: {
            "accuracy": 1.0,
            "dictionaries": cut(starts),
            "neurons": cut(starts, exact=True),
            "pca": cut(starts, exact=True),
            "random": cut(starts),
        }
        for task in ("ioi", "successor")
    }
    return {
        "dictionary": {
            "name": name,
            "kind": "linear",
            "reads": ["resid_post.1"],
            "writes": ["resid_post.1"],
            "sparsifier": {"kind": "top_k"},
            "skip": False,
        },
        "sparsity": {"l0": {"mean": l0}},
        "reconstruction": {"fvu": fvu},
        "circuits": {"dictionaries": together, "tasks": tasks},
    }


def at_site(own: dict[str, Any], site: str) -> dict[str, Any]:
    own["dictionary"] |= {"reads": [site], "writes": [site]}
    return own


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are made."""
    made: list[Figure] = []

    def keep(*args: Any, **settings: Any) -> Any:
        figure, axes = new_figure(*args, **settings)
        made.append(figure)
        return figure, axes

    new_figure = circuit_plots.new_figure
    monkeypatch.setattr(circuit_plots, "new_figure", keep)
    return made


def points_of(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def drawn(ax: Any, style: str) -> list[tuple[list[float], list[float]]]:
    """The points of dictionaries in a panel, by the style of their lines."""
    lines = [line for line in ax.lines if line.get_marker() != "None" and line.get_linestyle() == style]
    return [points_of(line) for line in lines]


def test_the_table_has_every_point_of_every_curve(tmp_path: Path) -> None:
    own = report("a", ["a", "b"])
    table = circuit_table(own)
    assert len(table) == 2 * (3 + 1 + 1 + 3) * 4
    for task, kind, mode in set(zip(table.task, table.cut, table.errors, strict=True)):
        rows = table.loc[(table.task == task) & (table.cut == kind) & (table.errors == mode)]
        expected = own["circuits"]["tasks"][task][kind][mode]["curve"]
        assert rows.n_nodes.tolist() == [0, 1, 10, 100]
        assert rows.faithfulness.tolist() == expected["faithfulness"]
    png = plot_circuits(own, tmp_path / "plots" / "a_circuits.png")
    assert png.stat().st_size > 5_000
    assert len(pd.read_csv(tmp_path / "plots" / "a_circuits.csv")) == len(table)


def test_the_plot_of_a_report_without_some_treatments_of_errors(tmp_path: Path, figures: list[Figure]) -> None:
    own = report("a", ["a"])
    ioi = own["circuits"]["tasks"]["ioi"]
    del ioi["dictionaries"]["kept"], ioi["random"]["scored"], ioi["neurons"]
    ioi["pca"]["scored"]["curve"]["low"] = [None] * 4
    own["circuits"]["tasks"]["successor"] = {"accuracy": 1.0, "dictionaries": {"error_share": 0.5}}
    plot_circuits(own, tmp_path / "a.png")
    labels = {
        str(line.get_label()) for line in figures[0].axes[0].lines if not str(line.get_label()).startswith("_")
    }
    assert labels == {
        "dictionaries, errors scored",
        "dictionaries, errors removed",
        "PCA",
        "random, errors removed",
    }
    assert [ax.get_title() for ax in figures[0].axes] == ["ioi", "successor: no curves"]
    for task in own["circuits"]["tasks"].values():
        task.clear()
    assert plot_circuits(own, tmp_path / "none.png").exists()


def test_a_sweep_has_the_numbers_of_every_report() -> None:
    reports = {
        "k8": report("k8", ["k8"], 8, 0.3),
        "k16": report("k16", ["k16"], 16, 0.2, start=10),
        "x": report("x", ["x", "y"], 4, 0.4, start=20),
    }
    table = sweep_table(reports)
    assert len(table) == 2 * 2 * 8  # of dictionaries that were measured alone
    for _, row in table.iterrows():
        own = reports[str(row.dictionary)]
        kind = "dictionaries" if row.cut == "dictionary" else row.cut
        section = own["circuits"]["tasks"][row.task][kind]
        assert row.site == "resid_post.1"
        summary = dict(section["scored" if row.errors == "none" else row.errors])
        summary.pop("curve")
        assert {key: row[key] for key in summary} == summary
        if row.cut == "dictionary":
            assert (row.architecture, row.sparsifier) == ("linear", "top_k")
            assert (row.l0, row.fvu) == (own["sparsity"]["l0"]["mean"], own["reconstruction"]["fvu"])
        else:
            assert all(pd.isna(row[key]) for key in ("architecture", "sparsifier", "l0", "fvu"))
        if row.errors == "none":
            assert row.cut in ("neurons", "pca")
            assert pd.isna(row.error_share)
        else:
            assert row.error_share == section["error_share"]
    assert not table.duplicated(["dictionary", "task", "cut", "errors"]).any()
    assert "curve" not in table
    empty = sweep_table({"x": reports["x"]})
    assert len(empty) == 0
    assert empty.dictionary.nunique() == 0


def test_the_architecture_tells_reads_and_skip_paths() -> None:
    own = report("t", ["t"])
    own["dictionary"] |= {
        "kind": "cross_layer",
        "reads": ["mlp_in.0", "mlp_in.1"],
        "writes": ["mlp_out.0", "mlp_out.1"],
    }
    own["dictionary"]["skip"] = True
    table = sweep_table({"t": own, "published": report("published", ["published"]) | {"circuits": own["circuits"]}})
    first = table[table.cut == "dictionary"].iloc[0]
    assert (first.architecture, first.site) == (
        "cross_layer from mlp_in.0+mlp_in.1 with skip",
        "mlp_out.0+mlp_out.1",
    )
    own["dictionary"]["skip"] = False
    assert sweep_table({"t": own}).architecture.dropna().unique().tolist() == ["cross_layer from mlp_in.0+mlp_in.1"]


def test_the_plot_of_a_sweep_has_errors_removed_and_scored(tmp_path: Path, figures: list[Figure]) -> None:
    reports = {
        "k32": report("k32", ["k32"], 32, 0.1, start=0.2),
        "k8": report("k8", ["k8"], 8, 0.3, start=0.3),
        "b": at_site(report("b", ["b"], 16, 0.2, start=0.4), "mlp_out.0"),
    }
    table = sweep_table(reports)
    png = plot_sweep(table, tmp_path / "new" / "sweep.png")
    assert png.exists()
    assert len(pd.read_csv(png.with_suffix(".csv"))) == len(table)
    axes = {(ax.get_title().splitlines()[0], ax.get_xlabel()): ax for ax in figures[0].axes}
    titles = [f"{task}, {site}" for task in ("ioi", "successor") for site in ("resid_post.1", "mlp_out.0")]
    assert list(axes) == [(title, x) for title in titles for x in ("L0", "FVU")]

    def value(name: str, kind: str, mode: str) -> float:
        return reports[name]["circuits"]["tasks"]["ioi"][kind][mode]["faithfulness_at_100"]

    by_l0, by_fvu = axes["ioi, resid_post.1", "L0"], axes["ioi, resid_post.1", "FVU"]
    for style, mode in (("-", "removed"), ("--", "scored")):
        k8, k32 = value("k8", "dictionaries", mode), value("k32", "dictionaries", mode)
        assert drawn(by_l0, style) == [([8, 32], [k8, k32])]
        assert drawn(by_fvu, style) == [([0.1, 0.3], [k32, k8])]
        other = value("b", "dictionaries", mode)
        assert drawn(axes["ioi, mlp_out.0", "L0"], style) == [([16], [other])]
    colors = {line.get_color() for ax in axes.values() for line in ax.lines if line.get_marker() != "None"}
    assert len(colors) == 2  # one for each site

    level = {str(line.get_label()): line for line in axes["ioi, mlp_out.0", "FVU"].lines}
    for label, kind, mode, style in (
        ("neurons", "neurons", "scored", "-"),
        ("PCA", "pca", "scored", "-"),
        ("random, errors removed", "random", "removed", "-"),
        ("random, errors scored", "random", "scored", "--"),
    ):
        assert points_of(level[label])[1] == [value("b", kind, mode)] * 2
        assert level[label].get_linestyle() == style
    beside = next(line for line in by_l0.lines if line.get_label() == "random, errors removed")
    assert points_of(beside) == ([8, 32], [value(name, "random", "removed") for name in ("k8", "k32")])
    labels = [text.get_text().replace("\n", " ") for text in figures[0].legends[0].get_texts()]
    assert labels == [
        "resid_post.1, linear, top_k",
        "mlp_out.0, linear, top_k",
        "errors removed",
        "errors scored",
        "neurons",
        "PCA",
        "random, errors removed",
        "random, errors scored",
    ]


def test_a_sweep_without_some_numbers(tmp_path: Path, figures: list[Figure]) -> None:
    """What is missing or None is left out; a panel without points, or with points beyond its axis, says so."""
    reports = {name: report(name, [name], l0, start=0.3) for name, l0 in {"a": 8.0, "b": 16.0, "c": 20.0}.items()}
    a, b, c = (own["circuits"]["tasks"]["ioi"] for own in reports.values())
    del a["dictionaries"]["scored"], b["dictionaries"]["kept"], b["neurons"], c["random"]["removed"]
    c["dictionaries"]["removed"]["faithfulness_at_100"] = None
    b["dictionaries"]["scored"]["faithfulness_at_100"] = -7.0
    for own in reports.values():
        own["reconstruction"] = {"fvu": None}
        for numbers in own["circuits"]["tasks"]["successor"]["dictionaries"].values():
            if isinstance(numbers, dict):
                numbers["faithfulness_at_100"] = None
    table = sweep_table(reports)
    errors = table[(table.task == "ioi") & (table.cut == "dictionary")].groupby("dictionary").errors.agg(list)
    assert errors.to_dict() == {"a": ["kept", "removed"], "b": ["scored", "removed"], "c": list(MODES)}
    plot_sweep(table, tmp_path / "sweep.png")
    l0, fvu, *successor = figures[0].axes
    assert [xs for xs, _ in drawn(l0, "-")] == [[8, 16]]
    assert [xs for xs, _ in drawn(l0, "--")] == [[16, 20]]
    assert l0.get_title() == "ioi, resid_post.1\n1 beyond the axis, see the CSV"
    nothing = "no dictionary has these numbers"
    assert fvu.get_title() == f"ioi, resid_post.1\n{nothing}"
    assert [ax.get_title() for ax in successor] == [f"successor, resid_post.1\n{nothing}"] * 2
    assert not drawn(fvu, "-")


@pytest.mark.parametrize("l0s", [(16.0, 16.0), (16.0, 16.0000001), (8.0, 64.0), (0.0, 3.0), (0.0, 0.0)])
def test_the_axes_of_a_sweep_have_plain_numbers(
    l0s: tuple[float, float], tmp_path: Path, figures: list[Figure]
) -> None:
    reports = {name: report(name, [name], l0, 0.021310281 + l0 / 1e9) for name, l0 in zip("ab", l0s, strict=True)}
    plot_sweep(sweep_table(reports), tmp_path / "sweep.png")
    for ax in figures[0].axes:
        formatter = ax.xaxis.get_major_formatter()
        assert not isinstance(formatter, ScalarFormatter)
        assert formatter.get_offset() == ""
        low, high = ax.get_xlim()
        shown = [tick.get_text() for tick in ax.get_xticklabels() if low <= tick.get_position()[0] <= high]
        assert len(shown) == len(set(shown)) >= 2
        assert all(len(text) <= 6 for text in shown)
        assert ax.yaxis.get_major_formatter().get_offset() == ""


def test_many_sites_share_panels(tmp_path: Path, figures: list[Figure]) -> None:
    sites = [f"resid_post.{layer}" for layer in range(12)]
    reports = {site: at_site(report(site, [site], start=0.1), site) for site in sites}
    reports[sites[-1]]["circuits"]["tasks"] = {}  # left out with a warning
    reports["one more"] = at_site(report("one more", ["one more"]), sites[-1])
    plot_sweep(sweep_table(reports), tmp_path / "sweep.png")
    assert [ax.get_title() for ax in figures[0].axes] == ["ioi"] * 2 + ["successor"] * 2
    lines = [line for line in figures[0].axes[0].lines if line.get_marker() != "None"]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12


def lines_of(reports: dict[str, Any]) -> list[list[str]]:
    table, console = circuits_table(reports), Console(record=True, width=80, file=StringIO())
    assert table is not None
    console.print(table)
    return [line.split() for line in console.export_text().splitlines() if "ioi" in line or "successor" in line]


def cells_of(section: dict[str, Any], mode: str) -> list[str]:
    """What a row has to say of a cut, by the keys of the report."""
    found = section[mode]
    share = f"{section['error_share']:.2f}" if "error_share" in section else "-"
    return [
        f"{found['n_at_0.5']:,.0f}",
        f"{found['n_at_0.8']:,.0f}",
        f"{found['faithfulness_at_100']:.2f}",
        f"{found['faithfulness_of_candidates']:.2f}",
        f"{found['faithfulness_of_all']:.2f}",
        share,
    ]


def expected(own: dict[str, Any], task: str, name: str, kind: str) -> list[list[str]]:
    """The rows of a cut, in the order of the report."""
    section = own["circuits"]["tasks"][task][kind]
    modes = [mode for mode in section if mode != "error_share"]
    return [
        [task, *name.split(), mode if "error_share" in section else "none", *cells_of(section, mode)]
        for mode in modes
    ]


def test_the_closing_table_of_dictionaries_measured_together() -> None:
    together = {name: report(name, ["a", "b"]) for name in "ab"}
    rows = [
        row
        for task in ("ioi", "successor")
        for kind in ("dictionaries", "neurons", "pca", "random")
        for row in expected(together["a"], task, "2 dictionaries" if kind == "dictionaries" else kind, kind)
    ]
    assert lines_of(together) == rows
    assert rows[0][4:] == ["105", "108", "0.19", "0.16", "0.17", "0.40"]  # all of them differ
    assert circuits_table({"a": {"sparsity": {}}}) is None


def test_the_closing_table_of_a_sweep_has_the_baselines_of_a_site_once() -> None:
    sites = ("mlp.0", "mlp.1")
    of_sites = {"k8": 0, "k16": 0, "j8": 1}
    reports = {
        name: at_site(report(name, [name], start=3.0 * i + 0.1), sites[site])
        for i, (name, site) in enumerate(of_sites.items())
    }
    first = reports["k8"]["circuits"]["tasks"]["ioi"]
    del first["dictionaries"]["kept"], first["pca"]["scored"], first["random"]
    first["dictionaries"]["scored"]["n_at_0.8"] = None
    found = lines_of(reports)
    rows = []
    for site, names in {"mlp.0": ("k8", "k16"), "mlp.1": ("j8",)}.items():
        for task in ("ioi", "successor"):
            missing = names[0] == "k8" and task == "ioi"
            k8 = reports["k8"]["circuits"]["tasks"]["ioi"]["dictionaries"]["scored"]
            k8["n_at_0.8"] = 0.0
            for name in names:
                rows += expected(reports[name], task, name, "dictionaries")
            for kind in ("neurons", "pca", "random"):
                beside = "k16" if missing and kind != "neurons" else names[0]  # who has it
                rows += expected(reports[beside], task, f"{kind}, {site}", kind)
    assert rows[0][4] == "0"
    rows[0][4] = "-"
    assert found == rows


def test_the_closing_table_is_80_columns_wide() -> None:
    names = ("resid_post.1_k8", "resid_post.1_k16")
    reports = {name: report(name, [name]) for name in names}
    reports["t"] = at_site(report("t", ["t"]), "mlp_out.11")
    table, console = circuits_table(reports), Console(record=True, width=80, file=StringIO())
    assert table is not None
    console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "candi-" in text
    assert "first dictionary" in " ".join(text.split())
    assert "…" not in text

"""Every plot is a PNG, and the CSV behind it has the same stem and the right numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dictlearn.evaluation.plots import new_figure, plot_l0, plot_report, plot_training
from dictlearn.evaluation.sections import density_histogram, l0_histogram
from dictlearn.metrics.sparsity import L0, FiringCounts
from tests.metrics.test_sparsity import random_latents

PNG = b"\x89PNG"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(
        "dictlearn.evaluation.plots.save_plot", lambda figure, _, png: figures.append(figure) or png
    )
    return figures


@pytest.fixture
def report() -> dict:
    latents = random_latents(300)
    latents[:, :2] = 0
    l0, firing = L0(latents.shape[1]), FiringCounts(latents.shape[1])
    l0.update(latents)
    firing.update(latents)
    return {
        "dictionary": {"name": "resid_post.2_k-16"},
        "sparsity": {"l0": {"mean": 4.0, "median": 4.0}, "n_dead": 2, "n_tokens": 300},
        "histograms": {
            "l0": l0_histogram(l0.n_tokens_with),
            "density": density_histogram(firing.density),
        },
    }


def test_histograms(report: dict, tmp_path: Path) -> None:
    pngs = plot_report(report, tmp_path / "plots")
    stems = ["resid_post.2_k-16_density", "resid_post.2_k-16_l0"]
    assert [png.name for png in pngs] == [f"{stem}.png" for stem in stems]
    assert all(png.read_bytes().startswith(PNG) for png in pngs)
    density, l0 = (pd.read_csv(tmp_path / "plots" / f"{stem}.csv") for stem in stems)
    assert density.n_latents.sum() == 38
    assert l0.n_tokens.sum() == 300
    assert l0.to_dict("list") == report["histograms"]["l0"]
    assert density.n_latents.tolist() == report["histograms"]["density"]["n_latents"]


def test_positions(tmp_path: Path) -> None:
    """A gap in the line and an empty cell where nothing is counted; each plot where its block ran."""
    report: dict = {
        "dictionary": {"name": "a"},
        "reconstruction": {
            "fvu": 0.25,
            "fvu_per_position": [None, 0.5, 0.25, 0.125],
            "n_tokens_per_position": [0, 4, 5, 6],
        },
    }
    (png,) = plot_report(report, tmp_path)
    assert png == tmp_path / "a_fvu_per_position.png"
    assert png.read_bytes().startswith(PNG)
    table = pd.read_csv(png.with_suffix(".csv"))
    assert table.position.tolist() == [0, 1, 2, 3]
    assert table.fvu.isna().tolist() == [True, False, False, False]
    assert table.fvu[1:].tolist() == [0.5, 0.25, 0.125]
    ces = {"clean": [None, 1.0, 2.0], "rec": [None, 1.5, 2.5], "zero": [None, 8.0, 7.0], "mean": [None, 9.0, 10.0]}
    report["behaviour"] = {"ce_per_position": ces, "n_tokens_per_position": [0, 3, 3], "delta_ce": 0.5}
    assert [path.stem for path in plot_report(report, tmp_path)] == ["a_fvu_per_position", "a_ce_per_position"]
    table = pd.read_csv(tmp_path / "a_ce_per_position.csv")
    assert list(table.columns) == ["position", "clean", "rec", "zero", "mean", "n_tokens", "delta"]
    for way, values in {**ces, "delta": [None, 0.5, 0.5]}.items():
        assert table[way].isna().tolist() == [True, False, False]
        assert table[way][1:].tolist() == values[1:]
    assert table.n_tokens.tolist() == [0, 3, 3]


def test_the_difference_of_cross_entropies_can_be_read(drawn: list[Figure], tmp_path: Path) -> None:
    """An ablation of 12 nats does not set the scale, and an undefined mean is no line."""
    ces = {"clean": [2.0, 1.0], "rec": [2.001, 1.003], "zero": [13.0, 13.0], "mean": [12.0, 12.0]}
    section = {"ce_per_position": ces, "n_tokens_per_position": [3, 3], "delta_ce": 0.002}
    for delta_ce, n_lines in ((0.002, 3), (None, 2)):
        plot_report({"dictionary": {"name": "a"}, "behaviour": section | {"delta_ce": delta_ce}}, tmp_path)
        both, delta = drawn.pop().axes
        assert len(both.lines) == 2
        assert both.get_ylim()[1] < 3
        assert delta.get_ylim()[1] < 0.01
        assert len(delta.lines) == n_lines
        assert np.asarray(delta.lines[0].get_ydata()) == pytest.approx([0.001, 0.003])


def test_the_l0_of_top_k_is_a_bar_and_wide_ranges_are_binned(
    report: dict, drawn: list[Figure], tmp_path: Path
) -> None:
    del report["histograms"]["density"]
    for l0, counts in (([16], [300]), (list(range(1, 1001)), [2] * 1000), ([0, 7], [5, 6])):
        report["histograms"]["l0"] = {"l0": l0, "n_tokens": counts}
        plot_l0(report, tmp_path / "l0.png")
        (ax,) = drawn.pop().axes
        low, high = ax.get_xlim()
        bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
        assert len(bars) <= 100
        assert sum(bar.get_height() for bar in bars) == sum(counts)
        assert bars[0].get_width() < (high - low) / 5
        assert low < l0[0] <= l0[-1] < high
        for value, n in zip(l0, counts, strict=True):
            (own,) = [bar for bar in bars if abs(value - bar.get_x() - bar.get_width() / 2) < bar.get_width() / 1.8]
            assert own.get_height() >= n


def test_nothing_counted_anywhere(tmp_path: Path) -> None:
    section = {"fvu": None, "fvu_per_position": [None, None], "n_tokens_per_position": [0, 0]}
    assert len(plot_report({"dictionary": {"name": "a"}, "reconstruction": section}, tmp_path)) == 1


def test_a_dictionary_that_is_dead_altogether(report: dict, tmp_path: Path) -> None:
    report["histograms"]["density"]["n_latents"] = [0] * 80
    report["histograms"]["l0"] = {"l0": [0], "n_tokens": [300]}
    assert len(plot_report(report, tmp_path)) == 2


def test_no_histograms_no_plots(tmp_path: Path) -> None:
    assert plot_report({"dictionary": {"name": "x"}, "errors": ["reconstruction: ..."]}, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_training_curves(tmp_path: Path) -> None:
    """Rows of a logger: cells are empty where a metric was not logged."""
    (tmp_path / "metrics.csv").write_text(
        "step,n_tokens,tokens_per_second,a.1/fvu,a.1/frac_dead,b/fvu\n"
        "0,1024,10.0,0.9,0.0,0.8\n"
        "10,11264,20.0,0.5,,0.4\n"
        "20,,30.0,,,\n"
        "30,31744,40.0,0.2,0.1,\n"
    )
    png = plot_training(tmp_path / "metrics.csv", tmp_path / "plots")
    assert png is not None
    assert png == tmp_path / "plots" / "training.png"
    assert png.read_bytes().startswith(PNG)
    table = pd.read_csv(png.with_suffix(".csv"))
    assert sorted(table.itertuples(index=False, name=None)) == sorted(
        [
            (0, 1024, 0.9, "a.1", "fvu"),
            (10, 11264, 0.5, "a.1", "fvu"),
            (30, 31744, 0.2, "a.1", "fvu"),
            (0, 1024, 0.0, "a.1", "frac_dead"),
            (30, 31744, 0.1, "a.1", "frac_dead"),
            (0, 1024, 0.8, "b", "fvu"),
            (10, 11264, 0.4, "b", "fvu"),
        ]
    )


def test_many_training_curves_are_told_apart(drawn: list[Figure], tmp_path: Path) -> None:
    names = [f"resid_post.{i}_k-16" for i in range(23)]
    header = ",".join(f"{name}/{metric}" for name in names for metric in ("loss", "fvu", "l0", "frac_dead"))
    rows = [f"{i},{n}," + ",".join([str(0.9 / i)] * 4 * len(names)) for i, n in ((1, 1_000), (2, 200_000))]
    (tmp_path / "metrics.csv").write_text("\n".join([f"step,n_tokens,{header}", *rows]))
    plot_training(tmp_path / "metrics.csv", tmp_path)
    (figure,) = drawn
    figure.draw_without_rendering()
    assert len(figure.axes) == 4
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == len(names)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    for ax in figure.axes:
        assert ax.get_legend() is None
        assert not legend.get_window_extent().overlaps(ax.get_window_extent())
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [tick.label1.get_window_extent() for tick in ticks]
        assert "200k" in [tick.label1.get_text() for tick in ticks]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("n", range(1, 9))
def test_panels_fill_the_figure(n: int) -> None:
    figure, axes = new_figure(n)
    assert len(axes) == n
    lines: dict[float, float] = {}
    for ax in axes:
        box = ax.get_position()
        lines[box.y0] = max(lines.get(box.y0, 0), box.x1)
    assert len(lines) == -(-n // 3)
    assert max(lines.values()) == pytest.approx(min(lines.values()))
    assert list(figure.axes) == axes


def test_no_training_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,n_tokens\n0,1024\n")
    assert plot_training(tmp_path / "metrics.csv", tmp_path / "plots") is None

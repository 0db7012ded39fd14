"""The frontier against brute force, and what its plot says."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dictlearn.evaluation.frontier import on_frontier
from dictlearn.evaluation.sweep import sweep_table, write_sweep
from tests.evaluation.test_sweep import grid, report


@pytest.mark.parametrize("n_values", [4, 1000])
@pytest.mark.parametrize("n_missing", [0, 5])
def test_the_frontier_is_what_nothing_dominates(n_values: int, n_missing: int) -> None:
    random.seed(0)
    for n in [*range(n_missing, 12 + n_missing), 60]:
        points = [(random.randrange(n_values), random.randrange(n_values)) for _ in range(n)]
        x, y = np.array(points, float).reshape(-1, 2).T
        x[:n_missing], y[2:n_missing] = math.nan, math.nan
        expected = [
            not math.isnan(a + b)
            and not any(c <= a and d <= b and (c < a or d < b) for c, d in zip(x, y, strict=True))
            for a, b in zip(x, y, strict=True)
        ]
        assert on_frontier(x, y).tolist() == expected


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(
        "dictlearn.evaluation.frontier.save_plot", lambda figure, _, png: figures.append(figure) or png
    )
    return figures


def draw(points: dict[str, dict[str, Any]], reports: dict[str, dict], folder: Path) -> pd.DataFrame:
    table = sweep_table(points, reports)
    write_sweep(table, folder)
    return table


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def ticks_of(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    ax = figure.axes[0]
    low, high = ax.get_xlim()
    return [tick.label1.get_text() for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_a_grid_has_its_values_in_plain_words(drawn: list[Figure], tmp_path: Path) -> None:
    draw(*grid(), tmp_path)
    (figure,) = drawn
    assert [ax.get_title() for ax in figure.axes] == ["resid_post.2", "resid_post.2", "mlp_out.1", "mlp_out.1"]
    assert legend_of(figure) == ["lr 0.0001", "lr 0.001", "frontier", "at the edge of the swept range"]
    assert ticks_of(figure) == ["8", "16", "32"]
    for ax in figure.axes:
        assert ax.get_xscale() == "log"
        low_lr, high_lr, rings = ax.collections
        assert [len(np.asarray(dots.get_offsets())) for dots in (low_lr, high_lr, rings)] == [3, 3, 4]
        assert not np.array_equal(np.asarray(low_lr.get_facecolor()), np.asarray(high_lr.get_facecolor()))
        assert len(ax.lines) == 1
        assert not any(text.get_text() for text in ax.texts)  # L0 says k


def test_sites_without_a_grid_share_a_panel(drawn: list[Figure], tmp_path: Path) -> None:
    sites = [f"resid_post.{i}" for i in range(4)]
    reports = {site: report(16.0, 0.1 * (i + 1), site) for i, site in enumerate(sites)}
    draw({site: {"site": site} for site in sites}, reports, tmp_path)
    (figure,) = drawn
    assert len(figure.axes) == 2
    assert legend_of(figure) == sites  # and no frontier where there is none
    assert ticks_of(figure) == ["16"]
    faces = [np.asarray(dots.get_facecolor()) for dots in figure.axes[0].collections]
    assert len({tuple(face[0]) for face in faces if len(face)}) == 4


def test_what_l0_does_not_say_is_beside_the_point(drawn: list[Figure], tmp_path: Path) -> None:
    """l1 is not L0; a run with TopK in the same sweep has none."""
    points: dict[str, dict[str, Any]] = {
        f"{l1}": {"site": "x", "sparsifier.l1": l1, "sparsifier._target_": "dictlearn.Relu"} for l1 in (0.1, 0.3)
    }
    points["k"] = {"site": "x", "sparsifier.l1": None, "sparsifier._target_": "dictlearn.TopK"}
    l0s = dict(zip(points, (50.0, 20.5, 7.0), strict=True))
    draw(points, {name: report(l0, 0.1, "x") for name, l0 in l0s.items()}, tmp_path)
    (figure,) = drawn
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["l1 0.1", "l1 0.3", ""]
    assert legend_of(figure) == ["sparsifier Relu", "sparsifier TopK"]


def test_many_sites_and_values_are_told_apart(drawn: list[Figure], tmp_path: Path) -> None:
    points, reports = {}, {}
    for site in range(12):
        for seed in (0, 1):
            for k in (8, 16):
                name = f"{site}_{seed}_{k}"
                points[name] = {"site": f"resid_post.{site}", "sparsifier.k": k, "seed": seed}
                reports[name] = report(float(k), 1 / k + seed, f"resid_post.{site}")
    draw(points, reports, tmp_path)
    (figure,) = drawn
    assert len(figure.axes) == 2
    assert legend_of(figure) == [f"resid_post.{i}, seed {s}" for i in range(12) for s in (0, 1)] + ["frontier"]
    handles = figure.legends[0].legend_handles[:-1]
    looks = {(handle.get_color(), handle.get_marker()) for handle in handles if isinstance(handle, Line2D)}
    assert len(looks) == 24
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.y0 >= 0
    assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes)

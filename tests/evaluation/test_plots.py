"""Every plot is a PNG, and the CSV behind it has the same stem and the right numbers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from dictlearn.evaluation.plots import plot_report, plot_training
from dictlearn.evaluation.sections import density_histogram, l0_histogram
from dictlearn.metrics.sparsity import L0, FiringCounts
from tests.metrics.test_sparsity import random_latents

PNG = b"\x89PNG"


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
    report["behaviour"] = {"ce_per_position": ces, "n_tokens_per_position": [0, 3, 3]}
    assert [path.stem for path in plot_report(report, tmp_path)] == ["a_fvu_per_position", "a_ce_per_position"]
    table = pd.read_csv(tmp_path / "a_ce_per_position.csv")
    assert list(table.columns) == ["position", "clean", "rec", "zero", "mean", "n_tokens"]
    for way, values in ces.items():
        assert table[way][1:].tolist() == values[1:]


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


def test_no_training_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,n_tokens\n0,1024\n")
    assert plot_training(tmp_path / "metrics.csv", tmp_path / "plots") is None

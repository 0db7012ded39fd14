"""The table of a sweep against brute force and small grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from dictlearn.evaluation.sweep import sweep_table, write_sweep
from dictlearn.types import DictlearnError
from tests.runs import composed


def report(l0: float | None, fvu: float | None, site: str = "resid_post.2", delta_ce: float | None = 0.1) -> dict:
    return {
        "dictionary": {"writes": [site]},
        "data": {"n_counted": 1000},
        "sparsity": {"l0": {"mean": l0}, "frac_dead": 0.25},
        "reconstruction": {"fvu": fvu},
        "behaviour": {
            "delta_ce": delta_ce,
            "ce_recovered_zero": 0.9,
            "ce_recovered_mean": 0.8,
            "kl_rec": 0.05,
        },
    }


def grid() -> tuple[dict[str, dict[str, Any]], dict[str, dict]]:
    """k in 3 values x lr in 2 values x 2 sites; of k, higher is better, of lr, one is."""
    points, reports = {}, {}
    for site in ("resid_post.2", "mlp.1"):
        for k in (8, 16, 32):
            for lr in (1e-4, 1e-3):
                name = f"{site}_k-{k}_lr-{lr}"
                points[name] = {"site": site, "sparsifier.k": k, "optimizer.lr": lr}
                writes = "mlp_out.1" if site == "mlp.1" else site
                reports[name] = report(float(k), 1 / k + lr, writes, delta_ce=2 / k - lr)
    return points, reports


def test_table() -> None:
    points, reports = grid()
    table = sweep_table(points, reports)
    assert table.dictionary.tolist() == list(points)
    assert list(table.columns) == [
        *("dictionary", "site", "sparsifier.k", "optimizer.lr", "l0", "fvu", "delta_ce", "ce_recovered_zero"),
        *("ce_recovered_mean", "kl_rec", "frac_dead", "heldout_n_tokens", "on_frontier", "edge"),
    ]
    assert table.site.tolist() == ["resid_post.2"] * 6 + ["mlp_out.1"] * 6
    assert table.on_frontier.tolist() == [True, False] * 6  # within each site
    ends = ["sparsifier.k:min"] * 2 + [""] * 2 + ["sparsifier.k:max"] * 2
    assert table.edge.tolist() == ends * 2  # two values of lr have no inside
    assert table.fvu.tolist() == [r["reconstruction"]["fvu"] for r in reports.values()]
    assert table.heldout_n_tokens.tolist() == [1000] * 12


def test_edges_of_several_keys_and_of_what_is_not_a_number() -> None:
    values = {
        "a": {"k": 1, "l1": 0.1, "kind": "x", "flag": True},
        "b": {"k": 2, "l1": 0.3, "kind": "y", "flag": False},
        "c": {"k": 3, "l1": 0.2, "kind": "z", "flag": True},
        "d": {"k": None, "l1": 0.2, "kind": "z", "flag": True},  # another sparsifier
    }
    table = sweep_table(values, {name: report(1.0, 0.5) for name in values})
    assert table.edge.tolist() == ["k:min l1:min", "l1:max", "k:max", ""]
    assert table.k[:3].tolist() == [1, 2, 3]
    assert pd.isna(table.k[3])


def test_what_is_missing_is_an_empty_cell(tmp_path: Path) -> None:
    points, reports = grid()
    failed, gone, *_ = points
    del reports[failed]["behaviour"]
    reports[failed]["reconstruction"] = {"fvu": None}
    del reports[gone]
    table = sweep_table(points, reports)
    assert not table.on_frontier[:2].any()
    write_sweep(table, tmp_path)
    stored = pd.read_csv(tmp_path / "sweep.csv")
    assert stored.shape == table.shape
    assert stored.loc[0, ["fvu", "delta_ce", "kl_rec"]].isna().all()
    assert stored.l0[0] == 8
    assert stored.loc[1, ["l0", "fvu", "heldout_n_tokens"]].isna().all()
    assert stored.site[1] == "resid_post.2"
    assert "nan" not in (tmp_path / "sweep.csv").read_text().lower()


def test_a_swept_key_has_no_name_of_another_column(tmp_path: Path) -> None:
    for key in ("fvu", "heldout_n_tokens", "edge"):
        with pytest.raises(DictlearnError, match=f"name of a column of the table: {key}"):
            sweep_table({"a": {"site": "x", key: 3}}, {})
    swept = [str(key) for key in composed("train", [])]
    swept = [
        key for key in swept if key not in ("site", "dictionary")
    ]  # the first is a column, a group's keys have dots
    points = {"a": dict.fromkeys(swept, 1), "b": dict.fromkeys(swept, 2)}
    table = sweep_table(points, dict.fromkeys(points, report(1.0, 0.5)))
    assert len(set(table.columns)) == len(table.columns)
    assert table.n_tokens.tolist() == [1, 2]
    assert table.heldout_n_tokens.tolist() == [1000, 1000]
    write_sweep(sweep_table({"a": {"site": "x", "n_tokens": 1}}, {"a": report(1.0, 0.5)}), tmp_path)
    assert pd.read_csv(tmp_path / "sweep.csv").n_tokens.tolist() == [1]


@pytest.mark.parametrize("n_sites", [1, 3, 6])
def test_files(tmp_path: Path, n_sites: int) -> None:
    points, reports = {}, {}
    for site in range(n_sites):
        for k in (4, 8, 16):
            name = f"{site}_{k}"
            points[name] = {"site": f"resid_post.{site}", "k": k}
            reports[name] = report(float(k), 1 / k, f"resid_post.{site}")
    write_sweep(sweep_table(points, reports), tmp_path)
    write_sweep(sweep_table(points, reports), tmp_path)  # replaces what is there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "sweep.csv"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["frontier.csv", "frontier.png"]
    drawn, table = pd.read_csv(tmp_path / "plots" / "frontier.csv"), pd.read_csv(tmp_path / "sweep.csv")
    pd.testing.assert_frame_equal(drawn, table)
    width, height = Image.open(tmp_path / "plots" / "frontier.png").size
    assert height / width == pytest.approx({1: 1, 3: 3, 6: 1}[n_sites] * 3 / 11, rel=0.2)


def test_a_sweep_without_any_number_writes_its_table(tmp_path: Path) -> None:
    write_sweep(sweep_table({"a": {"site": "resid_post.1", "k": 3}}, {}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.csv"]
    write_sweep(sweep_table({"a": {"site": "x", "k": 3}}, {"a": report(0.0, 1.0)}), tmp_path)  # no log of 0

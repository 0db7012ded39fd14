"""The table over the jobs of `train.py -m`."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from dictlearn.training.sweep import write_jobs_table
from tests.evaluation.test_sweep import report
from tests.runs import composed


def job(folder: Path, overrides: list[str], site: str = "resid_post.2", fvu: float = 0.5) -> None:
    folder.mkdir(parents=True)
    OmegaConf.save(composed("train", ["experiment=single", *overrides]), folder / "config.yaml")
    own = folder / "dictionaries" / site / "report.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps(report(16.0, fvu, site)))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("n_tokens", [10_000, 20_000]),
        ("seed", [0, 1]),
        ("sparsifier.k", [8, 16]),
        ("optimizer.lr", [0.1, 0.2]),
        ("evaluation.n_tokens", [5, 6]),
        ("normalise", ["none", "mean_norm"]),
    ],
)
def test_any_key_can_be_swept(tmp_path: Path, key: str, values: list) -> None:
    for i, value in enumerate(values):
        job(tmp_path / str(i), ["site=resid_post.2", f"{key}={value}", f"run_dir={tmp_path / str(i)}"])
        write_jobs_table(tmp_path)  # after every job
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert table[key].tolist() == values
    assert table.dictionary.tolist() == ["0/resid_post.2", "1/resid_post.2"]
    assert table.heldout_n_tokens.tolist() == [1000, 1000]
    assert list(table.columns[:4]) == ["dictionary", "site", key, "l0"]


def test_a_sweep_of_sites_has_one_column_of_them(tmp_path: Path) -> None:
    for i, site in enumerate(("resid_post.1", "mlp_out.2")):
        job(tmp_path / str(i), [f"site={site}"], site)
    (tmp_path / "2").mkdir()  # a job that has not written anything
    write_jobs_table(tmp_path)
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert table.site.tolist() == ["resid_post.1", "mlp_out.2"]
    assert list(table.columns[:3]) == ["dictionary", "site", "l0"]
    assert table.on_frontier.tolist() == [True, True]

"""The benchmarks of quality run at toy size, and compare as they say."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    return importlib.import_module


def test_a_power_of_l0_is_interpolated_exactly(load: Any) -> None:
    at_l0 = load("equal_l0").at_l0
    l0s = [32.0, 4.0, 10.0]
    fvus = [0.8 * l0**-0.7 for l0 in l0s]
    assert at_l0(l0s, fvus, 16.0, log=True) == pytest.approx(0.8 * 16**-0.7)
    deltas = [0.3 - 0.1 * math.log(l0) for l0 in l0s]  # negative at 32
    assert at_l0(l0s, deltas, 16.0, log=False) == pytest.approx(0.3 - 0.1 * math.log(16))
    assert at_l0(l0s, fvus, 4.0, log=True) == pytest.approx(fvus[1])
    assert math.isnan(at_l0(l0s, fvus, 33.0, log=True))
    assert math.isnan(at_l0([], [], 16.0, log=True))


def test_ratios_are_paired_by_seed(load: Any) -> None:
    equal_l0 = load("equal_l0")
    scale = {0: 1.0, 1: 2.0, 2: 4.0}  # the seeds differ far more than the architectures do
    rows = [
        {"architecture": name, "seed": seed, "l0": l0, "fvu": factor * scale[seed] / l0}
        for name, factors in {"a": (0.9, 0.9, 0.9), "b": (1.0, 1.0, 1.0), "c": (0.5, 2.0, 1.0)}.items()
        for seed, factor in enumerate(factors)
        for l0 in (8.0, 32.0)
    ]
    found = equal_l0.ratio(rows, "a", "b", 16.0)
    assert found["ratio"] == pytest.approx(0.9)
    assert found["stderr"] == pytest.approx(0.0, abs=1e-12)
    assert found["n_seeds"] == 3
    assert equal_l0.holds(found)
    assert not equal_l0.holds(equal_l0.ratio(rows, "b", "a", 16.0))
    wide = equal_l0.ratio(rows, "c", "b", 16.0)
    assert wide["ratio"] == pytest.approx(1.0)
    assert wide["stderr"] == pytest.approx(math.log(2) / math.sqrt(3))  # of log 1/2, log 2, 0
    means = equal_l0.at_equal_l0(rows, [16.0, 64.0], ["fvu"])
    assert [(row["architecture"], row["l0"]) for row in means] == [("a", 16), ("b", 16), ("c", 16)]  # none has 64
    assert means[1]["fvu"] == pytest.approx(7 / 3 / 16)
    assert means[1]["fvu_stderr"] == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3) / 16)


def test_frontier(load: Any, tmp_path: Path) -> None:
    sparsities = ["--architectures", "top_k", "--every", "4", "--l0s", "8,40"]
    load("frontier").main(["--quick", *sparsities, "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    table = pd.read_csv(tmp_path / "frontier.csv")
    assert list(table.value) == [4, 64]
    assert list(table.l0) == pytest.approx([4, 64], rel=0.05)
    assert table.fvu[1] < table.fvu[0] < 1
    assert table.delta_ce[1] < table.delta_ce[0]
    report = json.loads((tmp_path / "frontier.json").read_text())
    assert [(row["architecture"], row["l0"]) for row in report["at_equal_l0"]] == [("top_k", 8), ("top_k", 40)]
    assert report["at_equal_l0"][0]["fvu_stderr"] is None  # one seed
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    (run,) = (tmp_path / "work" / "seed-0").iterdir()
    assert not (run / "checkpoints").exists()


def test_our_dictionary_as_plain_tensors(load: Any, tmp_path: Path) -> None:
    quality = load("peers_quality")
    run = ["--quick", "--peers=", "--architectures", "top_k", "--every", "2", "--work", str(tmp_path / "work")]
    quality.main([*run, "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "peers_quality.csv")
    assert list(table.value) == [12]
    assert 11.5 < table.l0[0] <= 12
    heldout = torch.from_numpy(np.load(tmp_path / "work" / "heldout.npy"))
    (folder,) = (tmp_path / "work").glob("dictlearn-top_k-*/dictionaries/*")
    recon = load("dictlearn").load(folder)(heldout).recon.double()  # as anyone would measure it
    fvu = (heldout - recon).square().sum() / (heldout - heldout.double().mean(0)).square().sum()
    assert table.fvu[0] == pytest.approx(fvu.item(), rel=1e-6)


def test_tensors_that_are_not_the_contenders_are_refused(load: Any) -> None:
    quality, worker = load("peers_quality"), load("quality_worker")
    x, W = torch.randn(50, 6), torch.randn(6, 16)
    weights = worker.plain(W, torch.zeros(16), W.T / 16, torch.ones(6), threshold=torch.full((16,), 0.5))
    pre_acts = x @ W
    recon = torch.where(pre_acts > 0.5, pre_acts, 0.0) @ W.T / 16 + 1
    seconds = torch.tensor(1.0)
    found = quality.judged({**weights, "recon": recon[:10], "seconds": seconds}, x)
    assert found["l0"] == pytest.approx((pre_acts > 0.5).sum(-1).double().mean().item())
    assert found["frac_dead"] == pytest.approx((pre_acts <= 0.5).all(0).double().mean().item())
    with pytest.raises(ValueError, match="reconstruct something else"):
        quality.judged({**weights, "threshold": torch.zeros(16), "recon": recon[:10], "seconds": seconds}, x)


def test_the_best_rate_counts(load: Any) -> None:
    common = {"architecture": "top_k", "l0": 16.0, "frac_dead": 0.0}
    rows = [
        {**common, "contender": name, "lr_factor": rate, "seed": seed, "fvu": fvu + seed / 10}
        for name, rate, fvu in [("dictlearn", 1.0, 0.3), ("saelens", 1.0, 0.5), ("saelens", 3.0, 0.25)]
        for seed in range(2)
    ]
    (found,) = load("peers_quality").compare(rows, 16.0)
    assert found["best"]["saelens"]["fvu"] == pytest.approx(0.3)
    over = found["over_best_peer"]
    assert (over["a"], over["b"]) == ("dictlearn x1", "saelens x3")
    assert over["ratio"] == pytest.approx(math.sqrt(0.3 / 0.25 * 0.4 / 0.35))

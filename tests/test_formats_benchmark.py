"""The benchmark of the peers' files finds what differs and what is refused; a peer is made up here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
PEER = """
import json
import torch
from formats_worker import D, K, N_LATENTS
from safetensors.torch import load_file, save_file

SHAPE = (D,)
SHAPES = {"encoder.weight": (N_LATENTS, D), "encoder.bias": (N_LATENTS,), "W_dec": (N_LATENTS, D), "b_dec": (D,)}
CFG = {"d_in": D, "num_latents": N_LATENTS, "k": K, "activation": "topk", "transcode": True}


def make(**further):
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}, {**CFG, **further}


KINDS = {"same": make, "forgets its bias, always": make, "of tomorrow": lambda: make(activation="new")}


def save(made, folder):
    folder.mkdir()
    tensors, cfg = made
    if "forgets" in folder.name:
        tensors["encoder.bias"] = tensors["encoder.bias"] + 1e-3
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    if "forgets" in folder.name:
        tensors["encoder.bias"] = tensors["encoder.bias"] - 1e-3
    return made


def load(folder):
    return load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())


def compute(made, x):
    w, cfg = made
    pre_acts = (x.double() @ w["encoder.weight"].double().T + w["encoder.bias"]).relu()
    values, indices = pre_acts.topk(cfg["k"])
    latents = torch.zeros_like(pre_acts).scatter(-1, indices, values)
    return latents, latents @ w["W_dec"].double() + w["b_dec"]
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    (tmp_path / "formats_made_up.py").write_text(PEER)
    for folder in (FOLDER, tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


def test_what_differs_and_what_is_refused(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark, worker = load("peers_formats"), load("formats_worker")

    def run_here(peer: str, action: str, folder: Path) -> Any:
        worker.main([peer, action, str(folder)])
        return json.loads((folder / f"{action}.json").read_text())

    monkeypatch.setattr(benchmark, "run_peer", run_here)
    monkeypatch.setattr(benchmark, "FORMATS", {"made_up": "sparsify"})
    run = ["--peers", "made_up", "--out", str(tmp_path)]
    assert benchmark.main(run) == 1
    rows = {row["kind"]: row for row in json.loads((tmp_path / "peers_formats.json").read_text())["rows"]}
    they, we = benchmark.THEY, benchmark.WE
    assert 0 < rows["same"][they]["difference"] < 1e-6
    assert 0 < rows["same"][we]["difference"] < 1e-6
    biased = rows["forgets its bias, always"]
    assert 1e-5 < biased[they]["difference"] < 1e-2
    assert biased[we]["difference"] < 1e-6  # what we have read is written as it is
    assert "by us: of tomorrow/cfg.json: activation must be one of" in rows["of tomorrow"][they]["refused"]
    assert rows["of tomorrow"][we] == {"difference": None, "refused": None}
    assert "it is a crosscoder one" in rows["crosscoder"][we]["refused"]
    table = capsys.readouterr().out
    wrong = [line for line in table.splitlines() if line.startswith("NOT RIGHT")]
    assert [any(f"'{kind}'" in line for line in wrong) for kind in rows] == [
        kind in ("of tomorrow", "forgets its bias, always") for kind in rows
    ]
    assert "made_up: forgets its bias" in table  # by what stands before the comma

    made_up = load("formats_made_up")
    monkeypatch.setattr(made_up, "KINDS", {"same": made_up.make})
    assert benchmark.main(run) == 0


def test_misread_is_not_right(load: Any) -> None:
    benchmark = load("peers_formats")
    row = {"expected": benchmark.WE, benchmark.THEY: benchmark.Exchange()}
    assert benchmark.is_right({**row, benchmark.WE: benchmark.Exchange(refused="by us: it lacks that")})
    assert not benchmark.is_right({**row, benchmark.WE: benchmark.Exchange(0.7)})
    assert not benchmark.is_right({**row, benchmark.WE: benchmark.Exchange(float("nan"))})


def test_one_wrong_value_is_the_difference(load: Any) -> None:
    latents, recon = torch.rand(50, 8).numpy(), torch.rand(50, 4).numpy()
    recon[0, 0] = 10.0
    wrong = recon.copy()
    wrong[3, 2] += 0.5
    difference = load("peers_formats").difference
    expected = {"latents": latents, "recon": recon}
    assert difference(expected, {"latents": latents, "recon": wrong}) == pytest.approx(0.05, rel=1e-5)
    assert difference(expected, {"latents": latents, "recon": recon[:, :2]}) == float("inf")


def test_a_peer_that_cannot_run_says_why(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("peers_formats")
    assert benchmark.main(["--peers", "missing", "--out", str(tmp_path)]) == 1
    assert "missing: ModuleNotFoundError: No module named 'formats_missing'" in capsys.readouterr().out
    assert not (tmp_path / "peers_formats.json").exists()


def test_some_peers_do_not_take_the_place_of_all(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load("peers_formats")
    right = {"kind": "TopK", "group": "TopK", "expected": None, benchmark.WE: benchmark.Exchange()}
    right[benchmark.THEY] = benchmark.Exchange(1e-7)
    monkeypatch.setattr(benchmark, "exchange", lambda peer, _: [{**right, "peer": peer}])
    assert benchmark.main(["--peers", "sparsify,saelens", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "peers_formats.json").exists()
    assert benchmark.main(["--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "peers_formats.json").read_text())["rows"]
    assert [row["peer"] for row in rows] == list(benchmark.FORMATS)

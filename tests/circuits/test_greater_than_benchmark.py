"""The numbers of docs/transcoder_circuits.md: what the benchmark calls a metric, units and shares."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dictlearn.circuits.decomposition import decompose, latent_reader
from dictlearn.circuits.weights import linear_maps
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import LM, load_lm
from dictlearn.sparsifiers.top_k import TopK
from tests.circuits.setup import filled

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "transcoder_circuits.md").read_text()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("greater_than")


@pytest.fixture(scope="module")
def lm() -> LM:
    return load_lm("embedded")


def test_the_metric_and_the_neurons(benchmark: ModuleType, lm: LM) -> None:
    batch, halves = benchmark.prompts(lm)
    assert len(batch) == 97
    assert str(lm.tokenizer.decode(batch.clean[30])).endswith("The war lasted from 1732 to 17")
    assert (batch.answers[30] >= 0).sum() == 67
    assert int(batch.answers[30, 0]) == int(halves[33])
    whole = benchmark.value(lm, batch)
    assert whole == pytest.approx(stored()["metric"]["model"], abs=1e-4)
    with torch.no_grad():
        neurons = benchmark.Parts(lm, batch, 2, None)
        assert neurons.best(512) == pytest.approx(whole, abs=1e-6)
        assert neurons.best(0) == pytest.approx(stored()["metric"]["mlp.2 at its mean"], abs=1e-3)


def test_shares_of_all_sources_add_up(benchmark: ModuleType, lm: LM) -> None:
    batch, _ = benchmark.prompts(lm)
    made = {
        f"mlp_out.{layer}": filled(
            Linear(128, 128, 64, TopK(k=8), [f"mlp_in.{layer}"], [f"mlp_out.{layer}"]), layer
        ).float()
        for layer in range(3)
    }
    maps = linear_maps(lm.model)
    some = [decompose(maps, made, row[None]) for row in batch.clean[::20]]
    every = benchmark.bringers(some, 2, [3, 5], n_shown=1000)
    assert every["mean"].sum() == pytest.approx(1, abs=1e-3)
    assert latent_reader(some[0], 2, 3, benchmark.END).position == 8


def stored() -> Mapping:
    return json.loads((ROOT / "benchmarks" / "results" / "greater_than.json").read_text())


def test_the_page_has_the_numbers_of_the_results() -> None:
    found = stored()
    metric = found["metric"]
    rows = {row.split("|")[1].strip(): re.findall(r"\d\.\d{3}", row) for row in PAGE.splitlines() if row[:1] == "|"}
    assert rows["model"][0] == f"{metric['model']:.3f}"
    assert rows["MLP at its mean over the prompts"] == [f"{metric['mlp.2 at its mean']:.3f}"]
    for name in ("latents", "neurons"):
        assert rows[name][1:] == [f"{row[name]:.3f}" for row in found["sizes"]]
    for row in found["latents"]:
        assert f"| {row['latent']} | {row['active_for'].replace(' ', ', ')} | {row['promotes']} |" in PAGE

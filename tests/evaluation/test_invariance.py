"""What must not change a number of any block: batch size, order of rows, scale of the activations, padding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.evaluation import context as context_module
from dictlearn.evaluation.behaviour import Behaviour
from dictlearn.evaluation.reconstruction import Reconstruction
from dictlearn.lm.load import LM
from dictlearn.sparsifiers.top_k import TopK
from tests.evaluation.conftest import D_MODEL, N_ROWS, context_of, flat

BLOCKS = ("sparsity", "geometry", "reconstruction", "behaviour", "histograms")
BY_SCALE = {"reconstruction.mse_per_token": 2, "reconstruction.mse_per_dim": 2, "sparsity.l1_mean": 1}  # power of c


@pytest.fixture
def sae() -> Linear:
    sae = Linear(D_MODEL, D_MODEL, 24, TopK(k=5), reads=("resid_post.1",), writes=("resid_post.1",))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sae.requires_grad_(False)


def numbers(lm: LM, tokens: Tensor, sae: Linear, **options: Any) -> tuple[dict[str, float], pd.DataFrame]:
    context = context_of(lm, tokens, {"x": sae}, max_norm_ratio=1.3, **options)
    found = Reconstruction().run(context)["x"]
    table = found["tables"]["latents"]
    found |= Behaviour().run(context)["x"]
    return flat({block: found[block] for block in BLOCKS}), table


@pytest.mark.parametrize("batch_rows", [1, 7])
@pytest.mark.parametrize("chunk", [2**26, 97 * 4])
def test_batch_size_and_order(
    lm: LM, tokens: Tensor, sae: Linear, batch_rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = lm._replace(model=copy.deepcopy(lm.model).double())  # float32 products depend on their batch
    expected, expected_table = numbers(exact, tokens, sae.double())
    monkeypatch.setattr(context_module, "CHUNK_ELEMENTS", chunk)
    got, table = numbers(exact, tokens[torch.randperm(N_ROWS)], sae, batch_rows=batch_rows)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)
    pd.testing.assert_frame_equal(table, expected_table, rtol=1e-6)


@pytest.mark.parametrize("batch_rows", [5, 12])
@pytest.mark.parametrize("c", [2.0**-8, 2.0**8])
def test_scale(
    lm: LM, tokens: Tensor, sae: Linear, c: float, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x -> c x and the dictionary alike: latents are c times as large, nothing else changes but squared errors.

    A power of two, so that float32 activations of the LM are scaled exactly.
    """
    blocks = ("sparsity", "geometry", "reconstruction", "histograms")
    context = context_of(lm, tokens, {"x": sae}, batch_rows=batch_rows, max_norm_ratio=1.3)
    before = Reconstruction().run(context)["x"]
    for bias in (sae.b_enc, sae.b_dec):
        bias.mul_(c)
    true_activations = context_module.activations
    monkeypatch.setattr(
        context_module, "activations", lambda *a: {name: c * act for name, act in true_activations(*a).items()}
    )
    context = context_of(lm, tokens, {"x": sae}, batch_rows=batch_rows, max_norm_ratio=1.3)
    after = Reconstruction().run(context)["x"]
    expected = flat({block: before[block] for block in blocks})
    for name, power in BY_SCALE.items():
        expected[f".{name}"] *= c**power
    assert flat({block: after[block] for block in blocks}) == pytest.approx(expected, rel=1e-6, nan_ok=True)
    table, scaled = before["tables"]["latents"], after["tables"]["latents"]
    for column in ("mean", "max"):
        table[column] *= c
    pd.testing.assert_frame_equal(scaled, table, rtol=1e-6)


def test_padding(lm: LM, tokens: Tensor, sae: Linear) -> None:
    """Numbers by position get empty entries at the end; the one over masked tokens has them in."""
    expected, expected_table = numbers(lm, tokens, sae)
    got, table = numbers(lm, torch.cat([tokens, torch.zeros(N_ROWS, 6, dtype=torch.int64)], dim=1), sae)
    extra = {name: value for name, value in got.items() if name not in expected}
    assert len(extra) == 7 * 6  # two in reconstruction and five in behaviour
    assert all(math.isnan(value) or value == 0 for value in extra.values())
    ignored = (".reconstruction.fvu_incl_masked",)
    left = {name: value for name, value in expected.items() if name not in ignored}
    assert {name: got[name] for name in left} == pytest.approx(left, rel=1e-4, abs=1e-6, nan_ok=True)
    pd.testing.assert_frame_equal(table, expected_table, rtol=1e-5)

"""The L0 of a released dictionary beside the published one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dictlearn.evaluation import evaluate
from dictlearn.evaluation.published import l0_warnings
from dictlearn.evaluation.reconstruction import Reconstruction
from dictlearn.lm.load import LM
from tests.evaluation.conftest import autoencoder, context_of


def report(measured: float | None, fvu: float = 0.1, lm: str = "gpt2", **metadata: Any) -> dict[str, Any]:
    return {
        "dictionary": {"metadata": {"published_l0": 60.0, "lm_name": "gpt2", **metadata}},
        "lm": {"name": lm},
        "data": {"ctx": 128},
        "sparsity": {"l0": {"mean": measured}},
        "reconstruction": {"fvu": fvu},
    }


@pytest.mark.parametrize("measured", [60.0, 30.5, 119.0, None])
def test_near_the_published_one_nothing_is_said(measured: float | None) -> None:
    assert l0_warnings(report(measured)) == []


@pytest.mark.parametrize("published", [None, 0.0, "60", True])
def test_without_a_published_one_nothing_is_said(published: object) -> None:
    assert l0_warnings(report(600.0, published_l0=published)) == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (report(400.0, lm="pythia"), "L0 is 400 here and 60 as published: it was made for gpt2, this is pythia"),
        (report(29.0, prepend_bos=False), "without a BOS token, and here every row starts with one"),
        (report(400.0, ctx=64), "made on rows of 64 tokens, these have 128: give data.ctx=64"),
        (report(400.0, ctx=128, fvu=0.9), r"reconstruction is bad as well \(FVU 0.90\)"),
        (report(400.0, lm="someone/gpt2"), "reconstruction is sound, so likely the text"),
    ],
)
def test_the_likely_reason(given: dict[str, Any], reason: str) -> None:
    (warning,) = l0_warnings(given)
    assert re.search(reason, warning), warning


@pytest.mark.parametrize(
    ("measured", "kind", "warns"),
    [
        (105.0, "linear", True),
        (25.0, "linear", True),
        (23.0, "linear", False),
        (10.0, "linear", True),
        (11.0, "linear", False),
        (45.0, "cross_layer", False),
        (21.0, "cross_layer", True),
        (None, "linear", False),
    ],
)
def test_an_l0_far_from_its_target(measured: float | None, kind: str, warns: bool) -> None:
    given = report(measured, trained_as={"dictionary": kind, "sparsifier": {"target_l0": 16}}, published_l0=None)
    given["dictionary"]["reads"] = ["mlp_in.0", "mlp_in.1"]
    said = [w for w in l0_warnings(given) if re.search(r"target_l0 aims at (16|32): train longer, or with a", w)]
    assert bool(said) == warns == bool(l0_warnings(given))


def test_it_is_in_the_report(lm: LM, tokens: Tensor, tmp_path: Path) -> None:
    """relu(x) and relu(-x) of 16 dimensions: 16 latents fire on every token."""
    near, far = autoencoder(), autoencoder()
    near.metadata, far.metadata = {"published_l0": 16.0}, {"published_l0": 40.0}
    context = context_of(lm, tokens, {"near": near, "far": far})
    results = evaluate(context, {"reconstruction": Reconstruction()}, {n: tmp_path / n for n in ("near", "far")})
    assert results.reports["near"]["warnings"] == []
    (warning,) = results.reports["far"]["warnings"]
    assert warning.startswith("L0 is 16 here and 40 as published")
    assert json.loads((tmp_path / "far" / "report.json").read_text())["warnings"] == [warning]

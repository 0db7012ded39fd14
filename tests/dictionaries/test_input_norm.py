"""Input norms against their rules, written out token by token in float64; layer_norm has a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dictlearn.dictionaries._input_norm import INPUT_NORMS, KINDS
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub import load, save
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError

Token = list[float]
D = 6


def _mean(x: Token) -> float:
    return math.fsum(x) / len(x)


def _constant(x: Token) -> tuple[Token, float, float]:
    factor = math.sqrt(math.fsum(v * v for v in x) / len(x))
    return [v / factor for v in x], factor, 0.0


def _centre(x: Token) -> tuple[Token, float, float]:
    return [v - _mean(x) for v in x], 1.0, _mean(x)


def _rms(x: Token) -> tuple[Token, float, float]:
    rms = math.sqrt(math.fsum(v * v for v in x) / len(x) + 1e-6)
    return [v / rms for v in x], 1.0, 0.0


def _lm(x: Token) -> tuple[Token, float, float]:
    std = math.sqrt(math.fsum((v - _mean(x)) ** 2 for v in x) / len(x) + 1e-5)
    return [(v - _mean(x)) / std for v in x], 1.0, 0.0


RULES: dict[str, Callable[[Token], tuple[Token, float, float]]] = {  # what is read; what undoes it: factor, shift
    "constant_norm_rescale": _constant,
    "centre": _centre,
    "rms_norm": _rms,
    "lm_layer_norm": _lm,
}


def made(kind: str) -> Linear:
    generator = torch.Generator().manual_seed(0)
    write = "x" if KINDS[kind].undone else "y"
    dictionary = Linear(D, D, 16, ReLU(0.0), ["x"], [write], decoder_norm="free", input_norm=kind)
    for parameter in dictionary.parameters():
        parameter.data.normal_(generator=generator)
    return dictionary


@pytest.mark.parametrize("scale", [0.01, 1.0, 500.0])
@pytest.mark.parametrize("kind", RULES)
def test_the_rule(kind: str, scale: float) -> None:
    dictionary = made(kind)
    x = scale * (torch.randn(9, D, generator=torch.Generator().manual_seed(1)) + 2)
    out, w = dictionary(x), {name: p.double() for name, p in dictionary.named_parameters()}
    for t, token in enumerate(x.double().tolist()):
        z, factor, shift = RULES[kind](token)
        latents = (torch.tensor(z, dtype=torch.float64) @ w["W_enc"] + w["b_enc"]).relu()
        recon = (latents @ w["W_dec"] + w["b_dec"]) * factor + shift
        assert out.latents[t].tolist() == pytest.approx(latents.tolist(), rel=1e-4, abs=1e-4)
        assert out.recon[t].tolist() == pytest.approx(recon.tolist(), rel=1e-4, abs=1e-4 * max(scale, 1))


def test_every_kind_has_its_rule_here() -> None:
    assert set(INPUT_NORMS) == {"none", "layer_norm", *RULES}


@pytest.mark.parametrize("kind", RULES)
def test_of_a_token_of_zeros_every_value_is_finite(kind: str) -> None:
    assert made(kind)(torch.zeros(2, D)).recon.isfinite().all()


@pytest.mark.parametrize("kind", RULES)
def test_round_trip(tmp_path: Path, kind: str) -> None:
    dictionary = made(kind).for_inference()
    save(dictionary, tmp_path)
    again, x = load(tmp_path), torch.randn(5, D)
    assert isinstance(again, Linear)
    assert again.input_norm == kind
    assert torch.equal(again(x).recon, dictionary(x).recon)


@pytest.mark.parametrize("kind", RULES)
def test_what_it_does_not_fit_is_refused(kind: str) -> None:
    needs, writes = ("an autoencoder", ["y"]) if KINDS[kind].undone else ("a transcoder", ["x"])
    with pytest.raises(DictlearnError, match=f"input_norm={kind} needs {needs} of one"):
        Linear(D, D, 16, ReLU(0.0), ["x"], writes, input_norm=kind)

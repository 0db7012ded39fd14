"""Matryoshka: nested reconstruction losses in one decode, against a decode for each prefix."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import matryoshka
from dictlearn.dictionaries.linear import Linear
from dictlearn.dictionaries.matryoshka import Matryoshka
from dictlearn.kernels import decode
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, Encoded, SparseLatents
from tests.sparsifiers.unchecked import unchecked

N_LATENTS, PREFIXES, VARIANCE = 64, (0.125, 0.25, 0.5, 1.0), torch.tensor([4.0])


def reversed_rows(latents: SparseLatents) -> SparseLatents:
    """The same code with the entries of each token in another order."""
    order = torch.cat(
        [
            torch.arange(int(a), int(b)).flip(0)
            for a, b in zip(latents.offsets[:-1], latents.offsets[1:], strict=True)
        ]
    )
    return latents._replace(values=latents.values[order], indices=latents.indices[order])


class Shuffled(Matryoshka):
    """Its codes do not have their entries in ascending order."""

    def encode_step(self, x: Tensor) -> Encoded:
        latents, pre_acts = super().encode_step(x)
        assert isinstance(latents, SparseLatents)
        return Encoded(reversed_rows(latents), pre_acts)


def made_with(sparsifier: Sparsifier, kind: type[Matryoshka] = Matryoshka, **arguments: Any) -> Matryoshka:
    made = kind(6, 6, N_LATENTS, sparsifier, prefixes=PREFIXES, **arguments)
    for name, parameter in made.named_parameters():
        if not name.startswith("sparsifier."):
            parameter.data.normal_()
    return made


CASES: dict[str, Callable[[], Matryoshka]] = {
    "top_k": lambda: made_with(TopK(9)),
    "batch_top_k": lambda: made_with(BatchTopK(5)),
    "batch_top_k, not sorted": lambda: made_with(BatchTopK(5), Shuffled),
    "relu": lambda: made_with(ReLU(0.1)),
    "jump_relu": lambda: made_with(JumpReLU(0.1, threshold=0.5)),
    "skip": lambda: made_with(TopK(9), skip=True),
    "transcoder": lambda: made_with(BatchTopK(5), reads=["a"], writes=["b"]),
    "layer_norm": lambda: made_with(TopK(9), input_norm="layer_norm"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_mean_of_those_of_the_prefixes(case: str) -> None:
    made = CASES[case]()
    x = torch.randn(30, 6)
    y = torch.randn(30, 6) if case == "transcoder" else x
    step = made.step(x, y, VARIANCE)
    latents = step.latents.to_dense() if isinstance(step.latents, SparseLatents) else step.latents
    rest = made.b_dec + (step.x @ made.W_skip.T if made.W_skip is not None else 0)
    losses = []
    for end in (8, 16, 32, 64):
        recon = latents[:, :end] @ made.W_dec[:end] + rest
        losses.append((step.target - recon).square().sum(-1).mean() / 4)
    torch.testing.assert_close(step.recon, recon)  # of the whole
    found, expected = made.losses(step)["recon"], torch.stack(losses).mean()
    torch.testing.assert_close(found, expected)
    parameters = list(made.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)
    )


@pytest.mark.parametrize("case", ["top_k", "batch_top_k"])
def test_a_step_decodes_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = CASES[case](), torch.randn(30, 6)
    calls = []

    def counted(latents: SparseLatents, W_dec: Tensor) -> Tensor:
        calls.append(len(latents.values))
        return decode(latents, W_dec)

    monkeypatch.setattr(matryoshka, "decode", counted)
    monkeypatch.setattr("dictlearn.dictionaries.base.decode", counted)
    made.losses(made.step(x, x, VARIANCE))["recon"].backward()
    assert calls == [30 * (9 if case == "top_k" else 5)]


def test_sums_are_float32_under_autocast() -> None:
    made, x = made_with(ReLU(0.1)), torch.randn(200, 6)
    expected = made.losses(made.step(x, x, VARIANCE))["recon"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = made.step(x, x, VARIANCE)
        assert isinstance(step.latents, Tensor)
        latents = step.latents.split([8, 8, 16, 32], dim=-1)
        parts = [a @ b for a, b in zip(latents, made.W_dec.split([8, 8, 16, 32]), strict=True)]
        found = made.losses(step)["recon"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(step.recon, sum(part.float() for part in parts) + made.b_dec)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_one_prefix_is_a_linear_dictionary() -> None:
    torch.manual_seed(1)
    made = Matryoshka(6, 6, N_LATENTS, TopK(9), prefixes=[1])
    linear = Linear(6, 6, N_LATENTS, TopK(9))
    for dictionary in (made, linear):
        dictionary.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
    x = torch.randn(30, 6)
    found, expected = (d.losses(d.step(x, x, VARIANCE))["recon"] for d in (made, linear))
    torch.testing.assert_close(found, expected)


def test_the_ends_of_the_prefixes() -> None:
    assert Matryoshka(6, 6, 64, TopK(4)).ends == [2, 6, 14, 30, 64]
    assert Matryoshka(6, 6, 64, TopK(4)).config()["prefixes"] == [1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0]


@pytest.mark.parametrize("prefixes", [[], [0.5], [0.5, 0.25, 1.0], [0.0, 1.0], [0.5, 0.5, 1.0], [0.5, 2.0], [True]])
def test_shares_that_do_not_ascend_to_one_are_refused(prefixes: list[float]) -> None:
    with pytest.raises(DictlearnError, match=re.escape(f"that end at 1, got {prefixes}")):
        Matryoshka(6, 6, 64, TopK(4), prefixes=prefixes)


def test_a_prefix_without_latents_is_refused() -> None:
    with pytest.raises(DictlearnError, match=r"of 16 latents end at \[0, 2, 4, 8, 16\]: each needs latents"):
        Matryoshka(6, 6, 16, TopK(4))


@pytest.mark.parametrize("prefixes", [None, 0.5, [math.nan, 1.0]])
def test_what_is_no_list_of_shares_is_refused(prefixes: Any) -> None:
    with pytest.raises(DictlearnError, match=re.escape(f"that end at 1, got {prefixes}")):
        unchecked(Matryoshka, d_in=6, d_out=6, n_latents=64, sparsifier=TopK(4), prefixes=prefixes)

"""What holds for every sparsifier in the folder."""

import math
import re
from typing import Any

import pytest
import torch

from dictlearn.registry import kinds, lookup
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError
from tests.sparsifiers.unchecked import unchecked


@pytest.fixture(params=kinds("dictlearn.sparsifiers"))
def sparsifier(request: pytest.FixtureRequest) -> Sparsifier:
    made = lookup("dictlearn.sparsifiers", request.param).tiny()
    made.bind(16)
    return made


def test_sparse_and_dense_agree(sparsifier: Sparsifier) -> None:
    x, W_enc, b_enc = torch.randn(20, 6), torch.randn(6, 16), torch.randn(16)
    dense = sparsifier(x @ W_enc + b_enc)
    torch.testing.assert_close(sparsifier.encode_sparse(x, W_enc, b_enc).to_dense(), dense)


def test_latents_are_sparse_and_not_negative(sparsifier: Sparsifier) -> None:
    latents = sparsifier(torch.randn(50, 16))
    assert sparsifier.signed == bool((latents < 0).any())
    assert 0 < (latents != 0).float().mean() < 0.8


def test_config_rebuilds_it(sparsifier: Sparsifier) -> None:
    again = type(sparsifier)(**sparsifier.config())
    again.bind(16)
    pre_acts = torch.randn(5, 16)
    assert torch.equal(again(pre_acts), sparsifier(pre_acts))


def test_any_leading_axes(sparsifier: Sparsifier) -> None:
    pre_acts = torch.randn(2, 3, 16)
    assert torch.equal(sparsifier(pre_acts)[1, 2], sparsifier(pre_acts[1, 2]))


def test_top_k_keeps_the_k_largest() -> None:
    latents = TopK(2)(torch.tensor([[3.0, -1.0, 5.0, 4.0], [-1.0, -2.0, 7.0, -3.0]]))
    assert latents.tolist() == [[0.0, 0.0, 5.0, 4.0], [0.0, 0.0, 7.0, 0.0]]


@pytest.mark.parametrize("k", [0, -1, 2.5, 4.0, "4", None, True, math.nan, [4]])
def test_top_k_refuses_a_k_that_is_no_count(k: Any) -> None:
    rule = f"sparsifier.k must be a whole number, at least 1, got {k!r}."
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        unchecked(TopK, k=k)


@pytest.mark.parametrize("l1", [-1.0, -1e-9, math.nan, math.inf, -math.inf, "a", "0.1", None, True, [0.1]])
def test_relu_refuses_an_l1_that_is_no_weight(l1: Any) -> None:
    rule = f"sparsifier.l1 must be a finite number, at least 0, got {l1!r}."
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        unchecked(ReLU, l1=l1)


def test_a_k_beyond_the_latents_is_refused() -> None:
    TopK(8).bind(8)
    with pytest.raises(DictlearnError, match="at most n_latents = 8, got 9"):
        TopK(9).bind(8)


def test_whole_numbers_are_an_l1() -> None:
    assert ReLU(0).l1 == 0
    assert ReLU(2).l1 == 2

"""What holds for every sparsifier in the folder."""

import pytest
import torch

from dictlearn.registry import kinds, lookup
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError


@pytest.fixture(params=kinds("dictlearn.sparsifiers"))
def sparsifier(request: pytest.FixtureRequest) -> Sparsifier:
    return lookup("dictlearn.sparsifiers", request.param).tiny()


def test_sparse_and_dense_agree(sparsifier: Sparsifier) -> None:
    x, W_enc, b_enc = torch.randn(20, 6), torch.randn(6, 16), torch.randn(16)
    dense = sparsifier(x @ W_enc + b_enc)
    torch.testing.assert_close(sparsifier.encode_sparse(x, W_enc, b_enc).to_dense(), dense)


def test_latents_are_sparse_and_not_negative(sparsifier: Sparsifier) -> None:
    latents = sparsifier(torch.randn(50, 16))
    assert (latents >= 0).all()
    assert 0 < (latents > 0).float().mean() < 0.8


def test_config_rebuilds_it(sparsifier: Sparsifier) -> None:
    again = type(sparsifier)(**sparsifier.config())
    pre_acts = torch.randn(5, 16)
    assert torch.equal(again(pre_acts), sparsifier(pre_acts))


def test_any_leading_axes(sparsifier: Sparsifier) -> None:
    pre_acts = torch.randn(2, 3, 16)
    assert torch.equal(sparsifier(pre_acts)[1, 2], sparsifier(pre_acts[1, 2]))


def test_top_k_keeps_the_k_largest() -> None:
    latents = TopK(2)(torch.tensor([[3.0, -1.0, 5.0, 4.0], [-1.0, -2.0, 7.0, -3.0]]))
    assert latents.tolist() == [[0.0, 0.0, 5.0, 4.0], [0.0, 0.0, 7.0, 0.0]]


def test_wrong_values_are_refused() -> None:
    with pytest.raises(DictlearnError, match="whole number, at least 1, got 0"):
        TopK(0)
    with pytest.raises(DictlearnError, match="at most n_latents = 8, got 9"):
        TopK(9).check(8)
    with pytest.raises(DictlearnError, match="at least 0"):
        ReLU(-1.0)

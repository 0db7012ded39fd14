"""TopK, AbsTopK and GroupMax in training: a k that moves, and selection from given pre-activations."""

import pytest
import torch
from torch import Tensor

from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError
from tests.sparsifiers.steps import N_LATENTS, around, tokens


def n_stored(made: Sparsifier, way: str) -> set[int]:
    dictionary, x = around(made), tokens()
    if way == "select":
        latents = made.select(dictionary.pre_activations(x)).latents
    else:
        latents = dictionary.step(x, x, torch.ones(1)).latents
    assert not isinstance(latents, Tensor)
    return set(latents.offsets.diff().tolist())


@pytest.mark.parametrize("way", ["step", "select"])
@pytest.mark.parametrize(
    ("k", "k_start", "anneal", "at"),
    [
        (4, 16, 12, {0: 15, 5: 10, 11: 4, 12: 4, 99: 4}),
        (12, 2, 10, {0: 3, 4: 7, 9: 12, 50: 12}),  # up
        (4, 16, "run", {0: 16, 24: 13, 49: 10, 99: 4}),
        (4, None, "run", {0: 4, 99: 4}),
    ],
)
def test_k_moves_from_its_start(way: str, k: int, k_start: int, anneal: int | str | None, at: dict) -> None:
    sparsifier = TopK(k, k_start, anneal)
    assert n_stored(sparsifier, way) == {k}  # without a run, its end
    for step, expected in at.items():
        sparsifier.at(step, 100)
        assert n_stored(sparsifier, way) == {expected}
        pre_acts = torch.randn(9, N_LATENTS) + 10
        assert ((sparsifier(pre_acts) != 0).sum(-1) == k).all()  # at inference always k
    assert sparsifier.for_inference().config() == {"k": k}


def test_a_start_that_would_have_no_effect_is_refused() -> None:
    with pytest.raises(
        DictlearnError, match=r"k_start=16 needs sparsifier.anneal, a number of steps or run, got None"
    ):
        TopK(4, k_start=16, anneal=None)


def test_a_start_beyond_the_latents_is_refused() -> None:
    with pytest.raises(DictlearnError, match="k_start must be at most n_latents = 16, got 17"):
        TopK(4, k_start=17).bind(16)


@pytest.mark.parametrize("k", [3, 5, 32])
def test_groups_that_are_not_equal_are_refused(k: int) -> None:
    with pytest.raises(DictlearnError, match=f"must divide n_latents = 16, got {k}"):
        GroupMax(k).bind(16)
    with pytest.raises(DictlearnError, match="k must be at most n_latents = 2, got"):
        AbsTopK(k).bind(2)


def test_signs_are_kept() -> None:
    latents = AbsTopK(2)(torch.tensor([[3.0, -1.0, -5.0, 4.0], [-1.0, -2.0, 0.5, 0.1]]))
    assert latents.tolist() == [[0.0, 0.0, -5.0, 4.0], [-1.0, -2.0, 0.0, 0.0]]


def test_the_largest_of_each_group_stays() -> None:
    latents = GroupMax(2)(torch.tensor([[3.0, -1.0, -5.0, 4.0], [-1.0, -2.0, 0.5, 0.1]]))
    assert latents.tolist() == [[3.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.5, 0.0]]


@pytest.mark.parametrize("sparsifier", [TopK(4), AbsTopK(4), GroupMax(4)])
def test_selection_has_the_gradients_of_the_dense_rule(sparsifier: Sparsifier) -> None:
    pre_acts = torch.randn(30, N_LATENTS, requires_grad=True)
    weights = torch.randn(30, N_LATENTS)
    latents = sparsifier.select(pre_acts).latents
    assert not isinstance(latents, Tensor)
    dense = sparsifier(pre_acts)
    torch.testing.assert_close(latents.to_dense(), dense)
    (found,) = torch.autograd.grad((latents.to_dense() * weights).sum(), pre_acts)
    torch.testing.assert_close(found, weights * (dense != 0))

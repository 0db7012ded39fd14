"""Multi-TopK against a dense version that sorts every row, in values and in gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.losses.multi_top_k import MultiTopK
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import Learner
from dictlearn.types import DictlearnError, Step
from tests.runs import composed
from tests.sparsifiers.unchecked import unchecked

Make = Callable[[], Dictionary]


def random(made: Dictionary) -> Dictionary:
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return made


DICTIONARIES: dict[str, Make] = {
    "sae": lambda: random(Linear(6, 6, 16, TopK(2))),
    "abs": lambda: random(Linear(6, 6, 16, AbsTopK(2))),
    "skip": lambda: random(Linear(6, 5, 16, TopK(2), reads=["a"], writes=["b"], skip=True)),
    "sites": lambda: random(Crosscoder(6, 6, 16, TopK(2), reads=["a", "b"], writes=["a", "b"])),
    "layer_norm": lambda: random(Linear(6, 6, 16, TopK(2), input_norm="layer_norm")),
}


def step_of(made: Dictionary, n_tokens: int = 24, scale: float = 1.0) -> Step:
    generator = torch.Generator().manual_seed(2)
    sites = (2,) if made.site_axis else ()
    made.read_scale.fill_(1 / scale)
    made.write_scale.fill_(1 / scale)
    x, y = (scale * torch.randn(n_tokens, *sites, d, generator=generator) for d in (made.d_in, made.d_out))
    return made.step(x, y, torch.arange(3.0, 3.0 + len(made.writes)))


def slow(step: Step, k: int, coefficient: float) -> Tensor:
    """The weighted FVU with the k largest of each row kept, found by sorting."""
    d = step.dictionary
    pre_acts = step.x @ d.W_enc.reshape(-1, d.n_latents) + d.b_enc
    order = pre_acts.abs() if isinstance(d.sparsifier, AbsTopK) else pre_acts
    kept = torch.zeros_like(pre_acts, dtype=torch.bool)
    for row, values in enumerate(order):
        kept[row, values.argsort(descending=True)[:k]] = True
    latents = pre_acts * kept
    if not isinstance(d.sparsifier, AbsTopK):
        latents = latents.relu()
    recon = latents @ d.W_dec.flatten(1) + d.b_dec.flatten()
    if d.W_skip is not None:
        recon = recon + step.x @ d.W_skip.T
    squares = (step.target - recon).square().unflatten(-1, (len(step.variance), -1)).sum(-1)  # [batch, n_writes]
    return coefficient * (squares.mean(0) / step.variance).mean()


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_values_and_gradients_are_those_of_the_dense_version(name: str, factor: int) -> None:
    made = DICTIONARIES[name]()
    step = step_of(made)
    value, expected = MultiTopK(0.3, factor)(step), slow(step, 2 * factor, 0.3)
    torch.testing.assert_close(value, expected)
    weights = [p for p in made.parameters() if p.numel()]
    for weight, grad, by_hand in zip(
        weights,
        torch.autograd.grad(value, weights, materialize_grads=True),
        torch.autograd.grad(expected, weights, materialize_grads=True),
        strict=True,
    ):
        assert weight.any(), "a weight of zero would hide an error"
        torch.testing.assert_close(grad, by_hand, rtol=1e-4, atol=1e-5)


def test_it_trains_latents_that_the_selection_leaves_out() -> None:
    made = DICTIONARIES["sae"]()
    step = step_of(made, n_tokens=1)
    selected = set(step.latents.indices.tolist())  # type: ignore[union-attr]
    grad = torch.autograd.grad(MultiTopK()(step), made.W_enc)[0]
    assert set(grad.T.any(-1).nonzero().flatten().tolist()) - selected


def test_the_default_is_an_eighth_of_four_times_k() -> None:
    step = step_of(DICTIONARIES["sae"]())
    torch.testing.assert_close(MultiTopK()(step), slow(step, 8, 1 / 8))


def test_parts_of_a_batch_add_up_and_scale_does_not_matter() -> None:
    made = DICTIONARIES["sae"]()
    step = step_of(made)
    pairs = zip(step.x.split(6), step.target.split(6), strict=True)
    parts = [Step(made, x, y, y, step.latents, step.variance) for x, y in pairs]
    torch.testing.assert_close(torch.stack([MultiTopK()(part) for part in parts]).mean(), MultiTopK()(step))
    torch.testing.assert_close(MultiTopK()(step_of(made, scale=40.0)), MultiTopK()(step))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(6, 6, 16, ReLU(0.1)), "needs a sparsifier with as many latents .*, got ReLU"),
        (lambda: Linear(6, 6, 16, BatchTopK(4)), "top_k or abs_top_k, got BatchTopK"),
        (lambda: Linear(6, 6, 16, GroupMax(4)), "top_k or abs_top_k, got GroupMax"),
        (CrossLayer.tiny, "factor x sparsifier.k must be at most n_latents = 8, got 16"),
        (Bilinear.tiny, "one linear encoder, which Bilinear does not have"),
        (lambda: Linear(6, 6, 16, TopK(5)), "factor x sparsifier.k must be at most n_latents = 16, got 20"),
    ],
)
def test_it_refuses_what_it_does_not_fit(make: Make, message: str) -> None:
    with pytest.raises(DictlearnError, match=message):
        Learner("x", make(), {"multi_top_k": MultiTopK()}, torch.ones(1), 100, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sparsifier=batch_top_k"], "objective.multi_top_k needs a sparsifier .* got BatchTopK"),
        (["sparsifier.k=300"], "multi_top_k.factor x sparsifier.k must be at most n_latents = 1024, got 1200"),
        (["objective.multi_top_k.factor=1"], "multi_top_k.factor must be a whole number, at least 2, got 1"),
        (["objective.multi_top_k.coefficient=-1"], "multi_top_k.coefficient must be a finite number, at least 0"),
    ],
)
def test_preflight_says_so(overrides: list[str], message: str) -> None:
    from dictlearn.training.run import check

    given = ["objective=multi_top_k", *overrides]
    with pytest.raises(DictlearnError, match=message):
        check(composed("train", given), given)


@pytest.mark.parametrize("arguments", [{"factor": 2.0}, {"factor": 0}, {"coefficient": float("nan")}])
def test_values_that_are_none_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(DictlearnError, match="multi_top_k"):
        unchecked(MultiTopK, **arguments)

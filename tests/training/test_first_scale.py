"""The first reconstructions are as near as one factor of the latents can make them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.dictionaries.matryoshka import Matryoshka
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import prepare
from tests.training.planted import D, PlantedStream

N = 512


def sae(sparsifier: Sparsifier, cls: type[Linear] = Linear, **options: Any) -> Dictionary:
    return cls(D, D, N, sparsifier, reads=["x"], writes=["x"], **options)


MAKE: dict[str, Callable[[], Dictionary]] = {
    "top_k": lambda: sae(TopK(16)),
    "top_k_1": lambda: sae(TopK(1)),
    "batch_top_k": lambda: sae(BatchTopK(8)),
    "abs_top_k": lambda: sae(AbsTopK(8)),
    "relu": lambda: sae(ReLU(0.1)),
    "jump_relu": lambda: sae(JumpReLU(0.1, threshold=0.7, bandwidth=0.5)),
    "gated": lambda: sae(ReLU(0.1), Gated),
    "matryoshka": lambda: sae(BatchTopK(8), Matryoshka),
    "bilinear": lambda: sae(TopK(8), Bilinear),
    "crosscoder": lambda: Crosscoder(D, D, N, TopK(8), reads=["x", "y"], writes=["x", "y"]),
    "skip": lambda: sae(TopK(8), skip=True),
}


def gaussian(dictionary: Dictionary, n: int = 2_000) -> Tensor:
    """Activations with the means and variances of the planted ones, equal in all directions."""
    generator = torch.Generator().manual_seed(77)
    statistics = PlantedStream(1).statistics()
    acts = {
        site: statistics[site].mean.float()
        + (statistics[site].variance / D) ** 0.5 * torch.randn(n, D, generator=generator)
        for site in dictionary.reads
    }
    return dictionary.select_reads(acts)


def error(dictionary: Dictionary, x: Tensor, factor: float) -> float:
    """The mean squared error with latents `factor` times as large."""
    scaled = copy.deepcopy(dictionary)
    with torch.no_grad():
        scaled.scale_latents_(torch.full((N,), factor))
        step = scaled.step(x, x, torch.ones(len(dictionary.writes)))
        return float((step.recon - step.target).square().sum(-1).mean())


@pytest.mark.parametrize("normalise", ["mean_norm", "none"])
@pytest.mark.parametrize("kind", MAKE)
def test_another_factor_is_worse(kind: str, normalise: str) -> None:
    made = MAKE[kind]()
    prepare(made, PlantedStream(1).statistics(), normalise, torch.Generator().manual_seed(0))
    x = gaussian(made)
    here = error(made, x, 1.0)
    assert here < min(error(made, x, 0.8), error(made, x, 1.25)), "not the least one"
    total = made.step(x, x, torch.ones(len(made.writes))).target
    assert here < float((total - total.mean(0)).square().sum(-1).mean()), "worse than the mean"
    norms = made.W_dec.flatten(1).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(N))


def test_layer_normed_activations_too() -> None:
    made = sae(TopK(16), input_norm="layer_norm")
    prepare(made, PlantedStream(1).statistics(), "layer_norm", torch.Generator().manual_seed(0))
    x = gaussian(made)
    assert error(made, x, 1.0) < min(error(made, x, 0.8), error(made, x, 1.25))


def test_thresholds_and_bandwidth_are_multiples_of_the_pre_activations_as_they_start() -> None:
    made = MAKE["jump_relu"]()
    prepare(made, PlantedStream(1).statistics(), "mean_norm", torch.Generator().manual_seed(0))
    pre_acts = made.pre_activations(gaussian(made))
    assert pre_acts is not None
    root_mean_square = float(pre_acts.detach().square().mean().sqrt())
    sparsifier = made.sparsifier
    assert isinstance(sparsifier, JumpReLU)
    torch.testing.assert_close(sparsifier.thresholds, torch.full((N,), 0.7 * root_mean_square), rtol=0.03, atol=0)
    assert float(sparsifier.width) == pytest.approx(0.5 * root_mean_square, rel=0.03)


def test_a_threshold_that_follows_batches_has_not_moved() -> None:
    made = MAKE["batch_top_k"]()
    prepare(made, PlantedStream(1).statistics(), "mean_norm", torch.Generator().manual_seed(0))
    assert made.sparsifier.threshold == made.sparsifier.n_seen == 0
    assert made.training


def test_transcoders_keep_directions_of_norm_one() -> None:
    made = Linear(D, D, N, TopK(4), reads=["x"], writes=["y"])
    prepare(made, PlantedStream(1).statistics(), "mean_norm", torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.W_enc.norm(dim=0), torch.ones(N))

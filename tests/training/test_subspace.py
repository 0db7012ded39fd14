"""Directions drawn in a subspace, against an eigendecomposition of the sample covariance by numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dictlearn.data import SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import prepare
from dictlearn.training.run import _load
from dictlearn.training.subspace import SHARE, Size, top_subspace
from dictlearn.types import DictlearnError
from tests.runs import SMALL, composed

D = 12
SPREADS = {"a": [10.0, 6, 3, 1, 0.3, *[0.01] * 7], "b": [5.0, 5, *[0.02] * 10]}


def activations(site: str) -> np.ndarray:
    """[2000, D] about a mean far from zero, with these standard deviations along random axes."""
    rng = np.random.default_rng(ord(site))
    axes = np.linalg.qr(rng.normal(size=(D, D)))[0]
    return (rng.normal(size=(2_000, D)) * SPREADS[site]) @ axes + 30 * rng.normal(size=D)


def normed(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)


def statistics(with_covariance: bool = True) -> dict[str, SiteStatistics]:
    found = {}
    for site in SPREADS:
        x = activations(site)
        z = normed(x)
        found[site] = SiteStatistics(
            mean_norm=float(np.linalg.norm(x, axis=1).mean()),
            mean=torch.tensor(x.mean(0)),
            variance=float(x.var(0).sum()),
            n_tokens=len(x),
            median_norm=1.0,
            n_filtered=0,
            layer_norm_mean=torch.tensor(z.mean(0)),
            layer_norm_variance=float(z.var(0).sum()),
            covariance=torch.tensor(np.cov(x.T, ddof=0)) if with_covariance else None,
            layer_norm_covariance=torch.tensor(np.cov(z.T, ddof=0)) if with_covariance else None,
        )
    return found


def top(x: np.ndarray, n: int) -> np.ndarray:
    """The projection onto the n directions of largest variance, [D, D]."""
    _, vectors = np.linalg.eigh(np.cov(x.T, ddof=0))
    return vectors[:, -n:] @ vectors[:, -n:].T


def n_for(x: np.ndarray, share: float) -> int:
    variances = np.linalg.eigvalsh(np.cov(x.T, ddof=0))[::-1]
    return next(n for n in range(1, D + 1) if variances[:n].sum() >= share * variances.sum())


def prepared(
    dictionary: Dictionary, sizes: dict[str, Size], normalise: str = "mean_norm", seed: int = 0
) -> Dictionary:
    prepare(dictionary, statistics(), normalise, torch.Generator().manual_seed(seed), None, sizes)
    return dictionary


def sae(n_latents: int = 64, input_norm: str = "none") -> Linear:
    return Linear(D, D, n_latents, TopK(4), reads=["a"], writes=["a"], input_norm=input_norm)


def outside(rows: Tensor, projection: np.ndarray) -> float:
    """The largest norm of what a projection takes from a row."""
    rows_ = rows.detach().double().numpy()
    return float(np.linalg.norm(rows_ - rows_ @ projection, axis=1).max())


@pytest.mark.parametrize("size", [0.5, 0.9, 0.99, 0.9999, 1, 3])
def test_rows_lie_in_the_subspace_and_fill_it(size: Size) -> None:
    x = activations("a")
    n = n_for(x, size) if isinstance(size, float) else size
    made = prepared(sae(), {"a": size})
    assert outside(made.W_dec, top(x, n)) < 1e-6
    assert np.linalg.matrix_rank(made.W_dec.detach().numpy(), tol=1e-3) == n
    torch.testing.assert_close(made.W_dec.norm(dim=-1), torch.ones(64))
    cosines = torch.cosine_similarity(made.W_enc.T, made.W_dec)
    torch.testing.assert_close(cosines, torch.ones(64))
    mean = torch.tensor(x.mean(0)).float().unsqueeze(0)
    torch.testing.assert_close(made(mean).recon, mean)


def test_the_shares_of_the_planted_spectrum() -> None:
    covariance = torch.tensor(np.cov(activations("a").T, ddof=0))
    counts = [top_subspace(covariance, share).basis.shape[1] for share in (0.5, 0.9, 0.95, 0.999)]
    assert counts == [1, 2, 3, 4]  # variances 100, 36, 9, 1, 0.09 of 146


def test_directions_are_isotropic_inside_it() -> None:
    made = prepared(sae(20_000), {"a": 4})
    basis = np.linalg.eigh(np.cov(activations("a").T, ddof=0))[1][:, -4:]
    inside = made.W_dec.detach().double().numpy() @ basis
    np.testing.assert_allclose(inside.T @ inside / len(inside), np.eye(4) / 4, atol=0.01)
    np.testing.assert_allclose(inside.mean(0), 0, atol=0.02)


def test_the_whole_space_is_as_without_a_subspace() -> None:
    torch.testing.assert_close(prepared(sae(), {"a": D}).W_dec, prepared(sae(), {}).W_dec, atol=1e-6, rtol=0)
    assert outside(prepared(sae(), {}).W_dec, top(activations("a"), 4)) > 0.5


def test_a_seed_gives_the_same_weights() -> None:
    one, same, other = (prepared(sae(), {"a": 0.9}, seed=seed).W_dec for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_with_a_layer_norm_it_is_the_subspace_of_normed_activations() -> None:
    x = activations("a")
    made = prepared(sae(input_norm="layer_norm"), {"a": 2}, "layer_norm")
    assert outside(made.W_dec, top(normed(x), 2)) < 1e-6
    assert outside(made.W_dec, top(x, 2)) > 0.1


def test_a_transcoder_reads_in_the_subspace_of_its_read_site() -> None:
    made = prepared(Linear(D, D, 64, TopK(4), reads=["a"], writes=["b"]), {"a": 0.99})
    assert outside(made.W_enc.T, top(activations("a"), n_for(activations("a"), 0.99))) < 1e-6
    assert not made.W_dec.any()


def test_a_crosscoder_has_a_subspace_for_each_site() -> None:
    sites = ["a", "b"]
    made = prepared(Crosscoder(D, D, 64, TopK(4), reads=sites, writes=sites), {"a": 3, "b": 2})
    for place, (site, n) in enumerate({"a": 3, "b": 2}.items()):
        assert outside(made.W_dec[:, place], top(activations(site), n)) < 1e-6
    torch.testing.assert_close(made.flat_W_dec.norm(dim=-1), torch.ones(64))
    cosines = torch.cosine_similarity(made.flat_W_enc.T, made.flat_W_dec)
    torch.testing.assert_close(cosines, torch.ones(64))
    one = prepared(Crosscoder(D, D, 64, TopK(4), reads=sites, writes=sites), {"b": 2})
    assert outside(one.W_dec[:, 1], top(activations("b"), 2)) < 1e-6
    assert np.linalg.matrix_rank(one.W_dec[:, 0].detach().numpy()) == D


def test_a_gated_dictionary_starts_there_too() -> None:
    made = prepared(Gated(D, D, 64, ReLU(0.1), reads=["a"], writes=["a"]), {"a": 2})
    assert outside(made.W_dec, top(activations("a"), 2)) < 1e-6


def test_without_a_covariance_it_is_refused() -> None:
    with pytest.raises(
        DictlearnError, match=r"init_subspace=0.9 needs the covariance of the activations at a, which"
    ):
        prepare(sae(), statistics(False), "mean_norm", torch.Generator(), None, {"a": 0.9})


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["site=attn_out.2"], SHARE),
        (["site=transformer.h.2.attn"], SHARE),
        (["site=transformer.h.2.attn.c_proj"], SHARE),
        (["site=resid_post.2"], None),
        (["site=attn_out.2", "init_subspace=null"], None),
        (["site=resid_post.2", "dictionary.init_subspace=3"], 3),
    ],
)
def test_the_setting_reaches_the_weights(overrides: list[str], size: Size | None, tmp_path: Path) -> None:
    cfg = composed("train", [*SMALL, "experiment=single", *overrides, f"run_dir={tmp_path}"])
    setup = _load(cfg, lambda _: None)
    (site,) = setup.data.sites
    weights = setup.members[0].learner.dictionary.W_dec.detach()
    covariance = setup.data.statistics(2_048, [site.name])[site.name].covariance
    assert covariance is not None
    rank = np.linalg.matrix_rank(weights.numpy(), tol=1e-3)
    if size is None:
        assert rank == len(covariance)
        return
    variances, vectors = np.linalg.eigh(covariance.numpy())
    assert rank == size or (size == SHARE and rank < len(covariance))
    kept = vectors[:, -rank:]
    assert variances[-rank:].sum() >= (SHARE if size == SHARE else 0) * variances.sum()
    assert outside(weights, kept @ kept.T) < 1e-5

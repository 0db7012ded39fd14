"""Resampling of dead latents against its rule, token by token, and in runs."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dictlearn.data import Batch
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training import module as training_module
from dictlearn.training import resampling
from dictlearn.training.callbacks import RandomState, periodic_checkpoint
from dictlearn.training.learner import Learner
from dictlearn.training.module import Member
from dictlearn.training.optimizers import Adam, Muon, OptimizerSettings, RunOptimizer, SignSGD, build_optimizer
from dictlearn.training.resampling import Resample, draw, resample_
from dictlearn.types import DictlearnError
from tests.test_config import problems
from tests.training.planted import member
from tests.training.test_module import Stop, fit, weights

D, N, N_TOKENS = 6, 16, 40
REST = ((0.9, 0.999), 6.25e-10, None)
ADAM = Adam(1e-2, 1.0, *REST)
DEAD = torch.tensor([1, 6, 9, 14])


def made(
    kind: type[Dictionary], sparsifier: Sparsifier, reads: tuple[str, ...], writes: tuple[str, ...]
) -> Dictionary:
    dictionary = kind(D, D, N, sparsifier, reads, writes)
    make = torch.Generator().manual_seed(0)
    for p in dictionary.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=make)
    dictionary.read_scale.uniform_(0.5, 2.0, generator=make)
    dictionary.write_scale.copy_(dictionary.read_scale if reads == writes else dictionary.write_scale)
    dictionary.project_()
    return dictionary


KINDS: dict[str, Any] = {
    "sae": lambda: made(Linear, TopK(4), ("a",), ("a",)),
    "free": lambda: made(Linear, ReLU(0.1), ("a",), ("a",)),
    "transcoder": lambda: made(Linear, TopK(4), ("a",), ("b",)),
    "jump_relu": lambda: made(Linear, JumpReLU(), ("a",), ("a",)),
    "batch_top_k": lambda: made(Linear, BatchTopK(4), ("a",), ("a",)),
    "gated": lambda: made(Gated, ReLU(0.1), ("a",), ("a",)),
    "bilinear": lambda: made(Bilinear, TopK(4), ("a",), ("b",)),
    "crosscoder": lambda: made(Crosscoder, TopK(4), ("a", "b"), ("a", "b")),
    "cross_layer": lambda: made(CrossLayer, JumpReLU(penalty="l0"), ("a", "b"), ("c", "d")),
}


def batch() -> Batch:
    make = torch.Generator().manual_seed(5)
    index = torch.arange(N_TOKENS)
    acts = {site: 1.0 + torch.randn(N_TOKENS, D, generator=make) for site in "abcd"}
    return Batch(acts, index, index, index)


def learner_of(dictionary: Dictionary, micro_batch_size: int | None = None) -> Learner:
    made = Learner("x", dictionary, {}, torch.ones(len(dictionary.writes)), 100, None, micro_batch_size)
    made.statistics.is_dead[DEAD] = True
    made.statistics.tokens_since_fired[:] = 500
    return made


def stepped(learner: Learner, settings: OptimizerSettings) -> RunOptimizer:
    """An optimizer that has taken steps with random gradients, rather large ones."""
    optimizer = build_optimizer([(learner.dictionary, settings)])
    for _ in range(3):
        for p in learner.dictionary.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    learner.dictionary.project_()
    optimizer.zero_grad()
    return optimizer


def by_token(dictionary: Dictionary, data: Batch) -> tuple[Tensor, Tensor]:
    """Normalised reads and residuals of every token, from the public interface, [n_tokens, sites * width]."""
    with torch.no_grad():
        x, y = dictionary.select_reads(data.acts), dictionary.select_writes(data.acts)
        recon = dictionary(x).recon
        n_sites = len(dictionary.writes)
        error = (y - recon).view(N_TOKENS, n_sites, D) * dictionary.write_scale.view(n_sites, 1)
        reads = x.view(N_TOKENS, -1, D) * dictionary.read_scale.view(-1, 1)
    return reads.flatten(1), error.flatten(1)


def encoder_rows(dictionary: Dictionary) -> Tensor:
    return dictionary.W_enc.detach().reshape(-1, N).T


def own_part(dictionary: Dictionary, latent: int, whole: Tensor, writes: bool) -> Tensor:
    """What a latent reads or writes of all sites: in a cross-layer transcoder its own, or that and later ones."""
    if not isinstance(dictionary, CrossLayer):
        return whole
    layer = latent // (N // 2)
    return whole[..., layer * D :] if writes else whole[..., layer * D : (layer + 1) * D]


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_those_of_badly_reconstructed_tokens(kind: str) -> None:
    dictionary, data = KINDS[kind](), batch()
    if kind == "batch_top_k":
        dictionary.sparsifier.threshold.fill_(0.1)  # what the forward of the test uses
    learner = learner_of(dictionary)
    optimizer = stepped(learner, ADAM)
    reads, residual = by_token(dictionary, data)
    before = copy.deepcopy(dictionary)
    living = [i for i in range(N) if i not in DEAD.tolist()]
    resample_(learner, data, optimizer, 0.3, seed=7)
    W_enc, W_dec = encoder_rows(dictionary), dictionary.W_dec.detach().reshape(N, -1)
    old_enc, old_dec = encoder_rows(before), before.W_dec.detach().reshape(N, -1)
    assert torch.equal(W_enc[living], old_enc[living])
    assert torch.equal(W_dec[living], old_dec[living])
    used = []
    for latent in DEAD.tolist():
        mates = [i for i in living if not isinstance(dictionary, CrossLayer) or i // 8 == latent // 8]
        length = 0.3 * old_enc[living].norm(dim=-1).mean()
        assert W_enc[latent].norm() == pytest.approx(float(length), rel=1e-4)
        assert W_dec[latent].norm() == pytest.approx(float(old_dec[mates].norm(dim=-1).mean()), rel=1e-4)
        if kind == "batch_top_k":
            continue  # in training it selects over the batch: see the next test
        written = own_part(dictionary, latent, residual, writes=True)
        row = own_part(dictionary, latent, W_dec[latent], writes=True)
        token = int(F.cosine_similarity(row, written).argmax())
        torch.testing.assert_close(
            F.normalize(row, dim=0), F.normalize(written[token], dim=0), rtol=1e-3, atol=1e-4
        )
        seen = residual if dictionary.is_autoencoder else reads - reads.mean(0)
        seen = own_part(dictionary, latent, seen[token], writes=False)
        torch.testing.assert_close(
            F.normalize(W_enc[latent], dim=0), F.normalize(seen, dim=0), rtol=1e-3, atol=1e-4
        )
        mean = own_part(dictionary, latent, reads.mean(0), writes=False)
        assert float(W_enc[latent] @ mean + dictionary.b_enc[latent]) == pytest.approx(0, abs=1e-4)
        used.append(token)
    assert len(set(used)) == len(used), "every latent has a token of its own"


def test_what_a_sparsifier_follows_in_training_does_not_see_it() -> None:
    learner = learner_of(KINDS["batch_top_k"]())
    before = [buffer.clone() for buffer in learner.dictionary.sparsifier.buffers()]
    resample_(learner, batch(), stepped(learner, ADAM), 0.2, seed=7)
    after = list(learner.dictionary.sparsifier.buffers())
    assert len(after) > 1
    assert all(map(torch.equal, after, before))


def test_what_else_a_latent_has_starts_again() -> None:
    found = {}
    for kind in ("gated", "bilinear", "jump_relu", "cross_layer"):
        learner = learner_of(KINDS[kind]())
        optimizer = stepped(learner, ADAM)
        resample_(learner, batch(), optimizer, 0.2, seed=7)
        found[kind] = learner.dictionary
    assert torch.equal(found["gated"].r_mag[DEAD], torch.zeros(4))
    assert torch.equal(found["gated"].b_mag[DEAD], found["gated"].b_enc[DEAD])
    assert torch.equal(found["bilinear"].W_gate[:, DEAD], torch.zeros(D, 4))
    assert torch.equal(found["bilinear"].b_gate[DEAD], torch.ones(4))
    jump_relu = found["jump_relu"].sparsifier
    at_first = torch.full((4,), jump_relu.start) * jump_relu.unit
    assert torch.equal(jump_relu.thresholds[DEAD], at_first)
    assert not (jump_relu.thresholds[[0, 2, 3]] == at_first[0]).any()
    layers = found["cross_layer"].sparsifier.layers
    assert torch.equal(torch.cat([layer.thresholds for layer in layers])[DEAD], at_first)


@pytest.mark.parametrize("settings", [ADAM, Muon(1e-2, 0.95, 0.0, 1e-3, 1.0, *REST), SignSGD(1e-2, 1.0, 0.9)])
@pytest.mark.parametrize("kind", ["sae", "gated", "crosscoder", "cross_layer"])
def test_the_optimizer_forgets_these_rows_alone(settings: OptimizerSettings, kind: str) -> None:
    learner = learner_of(KINDS[kind]())
    dictionary = learner.dictionary
    optimizer = stepped(learner, settings)
    before = {p: copy.deepcopy(optimizer.state[p]) for p in dictionary.parameters()}
    resample_(learner, batch(), optimizer, 0.2, seed=7)
    n_compared = 0
    for name, p in dictionary.named_parameters():
        for key, value in optimizer.state[p].items():
            axes = [axis for axis, size in enumerate(p.shape) if size in (N, N // 2)]
            if value.shape != p.shape or not axes:  # Adam's count of steps, and what has no latents
                assert torch.equal(value, before[p][key])
                continue
            now, old, weight = (t.detach().movedim(axes[0], 0) for t in (value, before[p][key], p))
            first = 8 if name.endswith(("_1", "1.threshold")) else 0
            rows = [i - first for i in DEAD.tolist() if 0 <= i - first < len(now)]
            others = [i for i in range(len(now)) if i not in rows]
            assert torch.equal(now[rows], weight[rows] if key == "z" else torch.zeros_like(now[rows])), name
            assert torch.equal(now[others], old[others]), name
            n_compared += 1
    assert n_compared >= 3


def test_statistics_count_new_latents_as_fired() -> None:
    learner = learner_of(KINDS["sae"]())
    assert learner.statistics.dead is not None
    resample_(learner, batch(), stepped(learner, ADAM), 0.2, seed=7)
    assert learner.statistics.dead is None
    assert (learner.statistics.tokens_since_fired == 0).nonzero().squeeze(-1).tolist() == DEAD.tolist()
    before = copy.deepcopy(learner.dictionary.state_dict())
    resample_(learner, batch(), stepped(learner_of(KINDS["sae"]()), ADAM), 0.2, seed=8)  # none is dead now
    assert all(torch.equal(value, before[name]) for name, value in learner.dictionary.state_dict().items())


@pytest.mark.parametrize("kind", ["sae", "transcoder", "cross_layer"])
def test_chunks_of_a_batch_give_the_same_rows(kind: str) -> None:
    found = []
    for micro_batch_size in (None, 7):
        learner = learner_of(KINDS[kind](), micro_batch_size)
        torch.manual_seed(1)
        resample_(learner, batch(), stepped(learner, ADAM), 0.2, seed=7)
        found.append(learner.dictionary)
    for one, other in zip(*(d.parameters() for d in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_more_latents_than_tokens_start_again() -> None:
    data = batch()
    few = Batch({site: acts[:3] for site, acts in data.acts.items()}, *(t[:3] for t in data[1:]))
    learner = learner_of(KINDS["sae"]())
    resample_(learner, few, stepped(learner, ADAM), 0.2, seed=7)
    assert learner.statistics.dead is not None
    assert learner.statistics.dead.tolist() == DEAD[3:].tolist()
    assert learner.dictionary.W_dec.isfinite().all()


# -- the draw --


def test_tokens_are_drawn_in_proportion_to_their_weights() -> None:
    """Pearson's statistic over 8 cells, one of weight zero; 0.999 quantiles of chi-square with 6 and 5 degrees."""
    parts = torch.tensor([1.0, 2.0, 0.0, 3.0, 4.0, 8.0, 0.5, 1.5])
    draws = torch.stack([draw(parts, 3, torch.Generator().manual_seed(seed)) for seed in range(4_000)])
    assert all(len(set(row)) == 3 for row in draws.tolist())
    assert not (draws == 2).any()
    assert chi_square(draws[:, 0], parts) < 22.46
    second = draws[draws[:, 0] == 5][:, 1]  # the largest is gone: in proportion to what is left
    assert chi_square(second, torch.where(torch.arange(8) == 5, 0.0, parts)) < 20.52


def chi_square(drawn: Tensor, parts: Tensor) -> float:
    counts = drawn.bincount(minlength=len(parts))
    expected = len(drawn) * parts / parts.sum()
    return float(((counts - expected).square() / expected)[parts > 0].sum())


def test_the_loss_is_squared_and_sites_count_by_their_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens at known distances from what they are reconstructed as, at two write sites."""
    given = []

    def seen(weights: Tensor, n_drawn: int, generator: torch.Generator) -> Tensor:
        given.append(weights)
        return draw(weights, n_drawn, generator)

    monkeypatch.setattr(resampling, "draw", seen)
    dictionary = Crosscoder(D, D, N, TopK(4), ("a",), ("b", "c"))  # W_dec = b_dec = 0
    shares = torch.tensor([1.0, 2.0, 3.0, 4.0])
    b, c = torch.zeros(4, D), torch.zeros(4, D)
    b[:, 0], c[:, 1] = shares, 3 * shares  # loss (share^2 / 1 + 9 share^2 / 9) / 2 = share^2
    index = torch.arange(4)
    data = Batch({"a": torch.randn(4, D), "b": b, "c": c}, index, index, index)
    learner = Learner("x", dictionary, {}, torch.tensor([1.0, 9.0]), 100, None)
    learner.statistics.is_dead[0] = True
    resample_(learner, data, build_optimizer([(dictionary, ADAM)]), 0.2, seed=0)
    torch.testing.assert_close(given[0] / given[0].sum(), shares**4 / (shares**4).sum())


# -- when --


def dues(term: Resample, window: int, total: int) -> list[int]:
    ends = range(window, total + 1, window)
    return [now for now in ends if term.is_due(now - window, now, total)]


@pytest.mark.parametrize(
    ("every", "n_times", "window", "expected"),
    [
        (None, 4, 50, [150, 250, 400, 500]),  # after each eighth
        (None, 2, 100, [300, 500]),
        (200, 10, 50, [200, 400, 600]),  # none in the last quarter
        (200, 2, 50, [200, 400]),
        (20, 3, 50, [50, 100, 150]),  # windows are longer: each of them
        (130, 9, 100, [200, 300, 400, 600, 700]),
    ],
)
def test_when_it_is_due(every: int | None, n_times: int, window: int, expected: list[int]) -> None:
    assert dues(Resample(every, n_times), window, 1_000) == expected


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(DictlearnError, match="every_n_tokens must be null or a whole number, at least 1, got 0"):
        Resample(0)
    with pytest.raises(DictlearnError, match="n_times must be a whole number, at least 1, got 0"):
        Resample(n_times=0)
    with pytest.raises(DictlearnError, match="encoder_scale must be a positive number, got 0"):
        Resample(encoder_scale=0.0)
    late = problems("objective=resample", "objective.resample.every_n_tokens=1_600_000")
    assert "every_n_tokens must be at most 3/4 of n_tokens = 2000000" in late
    assert Resample(1_500_000).problem(2_000_000) is None


# -- runs --


def resampled(name: str, optimizer: OptimizerSettings, seed: int = 3, **settings: Any) -> Member:
    """Four latents of each can never fire until they start again."""
    found = member(name, dead_after=1_000, **settings)
    found.learner.terms = {"resample": Resample(n_times=2, encoder_scale=0.5), **found.learner.terms}
    found.learner.dictionary.b_enc.data[:4] = -100.0
    return found._replace(optimizer=optimizer, seed=seed)


def three() -> list[Member]:
    rest = ((0.9, 0.999), 6.25e-10, 1.0)
    return [
        resampled("a", Adam(3e-3, 1.0, *rest)),
        resampled("b", SignSGD(1e-3, 1.0, 0.95), writes="y"),
        resampled("c", Muon(1e-2, 0.95, 0.0, 1e-3, 1.0, *rest), seed=4),
    ]


@pytest.mark.parametrize("stop", [15, 31])
def test_a_run_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    """It is due at steps 16 and 32 of 60; checkpoints are at multiples of 6."""
    whole, again = three(), three()
    fit(whole, 60, [RandomState(), periodic_checkpoint(tmp_path / "whole", 60)])
    with pytest.raises(KeyError, match="killed"):
        fit(three(), 60, [Stop(stop), RandomState(), periodic_checkpoint(tmp_path / "cut", 60)])
    checkpoint = max((tmp_path / "cut").glob("*.ckpt"))
    fit(again, 60, [RandomState(), periodic_checkpoint(tmp_path / "cut", 60)], ckpt_path=checkpoint)
    for a, b in zip(whole, again, strict=True):
        for name, value in weights(a).items():
            assert torch.equal(value, weights(b)[name]), name


def test_a_k_that_moves_resumes_to_the_bit(tmp_path: Path) -> None:
    """It is due at the step of a checkpoint: what reconstructs then is k as it is at that step."""

    def annealed() -> Member:
        found = resampled("a", Adam(3e-3, 1.0, (0.9, 0.999), 6.25e-10, 1.0))
        found.learner.dictionary.sparsifier = TopK(4, k_start=32)
        return found

    whole, again = annealed(), annealed()
    fit([whole], 60, [RandomState(), periodic_checkpoint(tmp_path / "whole", 60)])
    with pytest.raises(KeyError, match="killed"):
        fit([annealed()], 60, [Stop(19), RandomState(), periodic_checkpoint(tmp_path / "cut", 60)])
    (checkpoint,) = (tmp_path / "cut").glob("step-00000018.ckpt")
    fit([again], 60, [RandomState(), periodic_checkpoint(tmp_path / "again", 60)], ckpt_path=checkpoint)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name


def test_it_happens_when_it_is_due_and_dictionaries_are_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(learner: Learner, data: Batch, optimizer: Any, scale: float, seed: int) -> None:
        calls.append((learner.name, seed))
        resample_(learner, data, optimizer, scale, seed)

    monkeypatch.setattr(training_module, "resample_", counted)
    together = three()
    fit(together, 60)
    assert calls == [(name, seed + at) for at in (18, 30) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    for alone, other in zip(three(), together, strict=True):
        fit([alone], 60)
        for name, value in weights(alone).items():
            assert torch.equal(value, weights(other)[name]), f"{alone.learner.name} {name}"


@pytest.mark.parametrize("with_aux_k", [False, True])
def test_latents_that_could_not_fire_do(with_aux_k: bool) -> None:
    found = resampled("a", Adam(3e-3, 1.0, (0.9, 0.999), 6.25e-10, 1.0))
    if not with_aux_k:
        del found.learner.terms["aux_k"]
    else:
        assert isinstance(found.learner.terms["aux_k"], AuxK)
    fit([found], 60)
    assert (found.learner.dictionary.b_enc[:4] > -10).all()
    assert cast(Tensor, found.learner.statistics.tokens_since_fired)[:4].max() < 60 * 128

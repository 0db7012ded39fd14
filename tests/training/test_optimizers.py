"""Every optimizer against its rule, and several of them as one."""

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.optimizers import (
    Adam,
    Muon,
    OptimizerSettings,
    RunOptimizer,
    SignSGD,
    average_,
    build_optimizer,
)
from dictlearn.training.optimizers.adam import InMemoryOrder
from dictlearn.training.optimizers.base import Together
from dictlearn.types import DictlearnError
from tests.runs import ROOT

CHOICES = sorted(path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml"))
SITES = {Linear: ("a",), Crosscoder: ("a", "b"), CrossLayer: ("a", "b")}
ADAM = Adam(1e-3, 1.0, (0.9, 0.999), 6.25e-10, 1.0)
MUON = Muon(2e-2, 0.95, 0.0, 1e-3, 1.0, (0.9, 0.999), 6.25e-10, 1.0)
SIGN = SignSGD(1e-2, 1.0, 0.9)


def default(choice: str) -> OptimizerSettings:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return instantiate(compose(f"optimizer/{choice}").optimizer)


def set_gradients(dictionary: nn.Module, step: int) -> None:
    """Random ones, laid out as the weights are; of no other parameter than by name and step."""
    for i, p in enumerate(dictionary.parameters()):
        make = torch.Generator().manual_seed(1_000 * i + step)
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=make))


def copies(dictionary: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in dictionary.parameters()]


# -- signSGD, schedule-free --


def schedule_free(start: Tensor, grads: list[Tensor], rates: list[float], b: float) -> tuple[Tensor, Tensor]:
    """The paper's three sequences, written out in float64: y and x after the last step."""
    x = y = z = start.double()
    weights = [max(rates[: t + 1]) ** 2 for t in range(len(rates))]
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True)):
        z = z - rate * torch.where(grad > 0, 1.0, torch.where(grad < 0, -1.0, 0.0)).double()
        c = weights[t] / math.fsum(weights[: t + 1])
        x = (1 - c) * x + c * z
        y = (1 - b) * z + b * x
    return y, x


@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_schedule_free_sign_sgd_is_the_paper_s(momentum: float) -> None:
    dictionary = Linear.tiny()
    dictionary.decoder_norm = "free"
    start = copies(dictionary)
    optimizer = build_optimizer([(dictionary, SignSGD(0.02, 1.0, momentum))])
    factors = [0.1, 0.5, 1.0, 1.0, 1.0, 0.6, 0.2, 0.9] * 3
    scheduler = LambdaLR(optimizer, lambda step: factors[step] if step < len(factors) else 1.0)
    grads: list[list[Tensor]] = []
    for step in range(len(factors)):
        set_gradients(dictionary, step)
        dictionary.W_dec.grad[step % 5] = 0.0  # type: ignore[index]  (rows without a gradient stay)
        grads.append([p.grad.clone() for p in dictionary.parameters()])  # type: ignore[union-attr]
        optimizer.step()
        scheduler.step()
    rates = [0.02 * factor for factor in factors]
    expected = [schedule_free(s, [g[i] for g in grads], rates, momentum) for i, s in enumerate(start)]
    for p, (y, _) in zip(dictionary.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), y.float(), rtol=1e-5, atol=1e-6)
    average_(optimizer, dictionary)
    for p, (_, x) in zip(dictionary.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), x.float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [Linear, CrossLayer])
def test_all_three_sequences_are_scaled_where_the_decoder_is_unit(kind: type[Dictionary]) -> None:
    writes = ("c", "d") if kind is CrossLayer else SITES[kind]
    dictionary = kind(5, 5, 16, TopK(4), SITES[kind], writes, decoder_norm="unit")
    for p in dictionary.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    dictionary.project_()
    optimizer = build_optimizer([(dictionary, SignSGD(0.1, 1.0, 0.9)), (Linear.tiny(), ADAM)])
    decoders = dictionary.decoders
    x = [rows.detach().double() for rows in decoders]
    y, z = list(x), list(x)
    for step in range(8):
        set_gradients(dictionary, step)
        for i, rows in enumerate(decoders):
            assert rows.grad is not None
            z[i] = z[i] - 0.1 * rows.grad.double().sign()
            x[i] = (step * x[i] + z[i]) / (step + 1)  # equal rates: the plain mean
            y[i] = 0.1 * z[i] + 0.9 * x[i]
            norm = y[i].flatten(1).norm(dim=-1).view(-1, *[1] * (y[i].ndim - 1))
            x[i], y[i], z[i] = x[i] / norm, y[i] / norm, z[i] / norm
        optimizer.step()
        optimizer.project_(dictionary)
    for i, rows in enumerate(decoders):
        torch.testing.assert_close(rows.detach(), y[i].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(optimizer.state[rows]["z"], z[i].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cast(Tensor, optimizer.average(rows)), x[i].float(), rtol=1e-4, atol=1e-5)


def test_the_average_is_on_the_constraint_set_and_training_goes_on_from_what_it_was() -> None:
    dictionary = Linear(6, 6, 16, JumpReLU(), decoder_norm="unit")
    dictionary.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
    optimizer = build_optimizer([(dictionary, SignSGD(0.1, 1.0, 0.9))])
    for step in range(5):
        set_gradients(dictionary, step)
        optimizer.step()
        optimizer.project_(dictionary)
    before, raw = copies(dictionary), cast(Tensor, optimizer.average(dictionary.W_dec))
    assert (raw.norm(dim=-1) - 1).abs().max() > 1e-2
    trained = average_(optimizer, dictionary)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=-1), torch.ones(16))
    torch.testing.assert_close(dictionary.W_dec.detach(), nn.functional.normalize(raw, dim=-1))
    assert dictionary.sparsifier.get_parameter("threshold").min() >= 0
    assert all(torch.equal(trained[p], old) for p, old in zip(dictionary.parameters(), before, strict=True))


def test_adam_and_muon_evaluate_what_they_train() -> None:
    dictionary = Linear.tiny()
    for settings in (ADAM, MUON):
        optimizer = build_optimizer([(dictionary, settings)])
        set_gradients(dictionary, 0)
        optimizer.step()
        before = copies(dictionary)
        assert average_(optimizer, dictionary) == {}
        assert all(map(torch.equal, copies(dictionary), before))


# -- Muon --


def matrices_of(dictionary: Dictionary) -> dict[str, list[Tensor]]:
    """What Muon has to see, written out for each architecture."""
    W_enc, W_skip = dictionary.W_enc.detach(), dictionary.get_parameter("W_skip").detach()
    if isinstance(dictionary, CrossLayer):
        n = dictionary.n_latents // 2
        return {
            "W_enc": [W_enc[:, :n].T.clone(), W_enc[:, n:].T.clone()],
            "W_dec_0": [dictionary.get_parameter("W_dec_0").detach().reshape(n, 10).clone()],
            "W_dec_1": [dictionary.get_parameter("W_dec_1").detach().reshape(n, 5).clone()],
            "W_skip": [W_skip[0].clone(), W_skip[1].clone()],
        }
    n_sites = len(dictionary.reads)
    return {
        "W_enc": [W_enc.reshape(n_sites * 5, -1).T.clone()],
        "W_dec": [dictionary.W_dec.detach().reshape(-1, n_sites * 5).clone()],
        "W_skip": [W_skip.reshape(n_sites * 5, n_sites * 5).clone()],
    }


@pytest.mark.parametrize("kind", [Linear, Crosscoder, CrossLayer])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_is_torch_s_on_the_matrices(kind: type[Dictionary], weight_decay: float) -> None:
    writes = ("c", "d") if kind is CrossLayer else SITES[kind]
    dictionary = kind(5, 5, 16, TopK(4), SITES[kind], writes, skip=True)
    for p in dictionary.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    matrices = {name: list(map(nn.Parameter, found)) for name, found in matrices_of(dictionary).items()}
    rest = {n: nn.Parameter(p.detach().clone()) for n, p in dictionary.named_parameters() if n not in matrices}
    assert set(rest) == {"b_enc", "b_dec"}
    settings = Muon(2e-2, 0.9, weight_decay, 1e-3, 1.0, (0.9, 0.999), 6.25e-10, None)
    optimizer = build_optimizer([(dictionary, settings)])
    flat = [matrix for found in matrices.values() for matrix in found]
    muon = torch.optim.Muon(flat, 2e-2, weight_decay, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(rest.values(), 1e-3, (0.9, 0.999), 6.25e-10)
    for step in range(4):
        set_gradients(dictionary, step)
        gradients = copy.deepcopy(dictionary)
        for p, own in zip(gradients.parameters(), dictionary.parameters(), strict=True):
            p.data.copy_(own.grad)  # type: ignore[arg-type]
        for name, found in matrices_of(gradients).items():
            for matrix, grad in zip(matrices[name], found, strict=True):
                matrix.grad = grad
        for name, p in rest.items():
            p.grad = gradients.get_parameter(name).detach().clone()
        for each in (optimizer, muon, adam):
            each.step()
    for name, found in matrices_of(dictionary).items():
        assert all(map(torch.equal, found, matrices[name])), name
    for name, expected in rest.items():
        torch.testing.assert_close(dictionary.get_parameter(name).detach(), expected.detach())


@pytest.mark.parametrize("n_latents", [64, 512])
def test_an_update_of_muon_has_the_size_of_adam_s_at_every_width(n_latents: int) -> None:
    dictionary = Linear(16, 16, n_latents, TopK(4))
    optimizer = build_optimizer([(dictionary, MUON)])
    set_gradients(dictionary, 0)
    before = dictionary.W_dec.detach().clone()
    optimizer.step()
    update = dictionary.W_dec.detach() - before
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2 * MUON.lr, rel=0.3)
    values = torch.linalg.svdvals(update) / (0.2 * MUON.lr * n_latents**0.5)
    assert 0.6 < values.min() <= values.max() < 1.3, "orthogonal, as far as five iterations go"


def test_the_rates_of_muon_and_sign_sgd() -> None:
    narrow, wide = Linear(2, 2, 2**14, TopK(1)), Linear(2, 2, 2**16, TopK(1))
    rates = [
        [group["lr"] for group in build_optimizer([(d, default(choice))]).param_groups]
        for choice in ("muon", "sign_sgd")
        for d in (narrow, wide)
    ]
    expected = [[2e-3, 6e-4], [2e-3, 3e-4], [5e-3], [2.5e-3]]
    assert [pytest.approx(e) for e in expected] == rates
    assert build_optimizer([(wide, SignSGD(None, 2.0, 0.9))]).param_groups[0]["lr"] == pytest.approx(5e-3)
    assert build_optimizer([(wide, SignSGD(0.1, 2.0, 0.9))]).param_groups[0]["lr"] == 0.1


# -- several as one --


def three() -> list[tuple[Dictionary, OptimizerSettings]]:
    def made(kind: type[Dictionary]) -> Dictionary:
        return kind.tiny()

    return [(made(Linear), SIGN), (made(Crosscoder), MUON), (made(Linear), ADAM), (made(CrossLayer), SIGN)]


FACTORS: list[Callable[[int], float]] = [
    lambda step: 1 / (1 + step),
    lambda step: 0.5 ** (step // 2),
    lambda _: 1.0,
    lambda step: 2.0 if step == 2 else 1.0,
]


def trained(
    members: list[tuple[Dictionary, OptimizerSettings]], factors: list[Callable[[int], float]]
) -> tuple[RunOptimizer, LambdaLR, Callable[[int], None]]:
    optimizer = build_optimizer(members)
    lambdas = [factors[group["member"]] for group in optimizer.param_groups]
    scheduler = LambdaLR(optimizer, lambdas)

    def step(index: int) -> None:
        for dictionary, _ in members:
            set_gradients(dictionary, index)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return optimizer, scheduler, step


def test_several_optimizers_are_each_as_if_alone() -> None:
    members = three()
    optimizer, _, step = trained(members, FACTORS)
    assert isinstance(optimizer, Together)
    for index in range(6):
        step(index)
    assert all(p.grad is None for dictionary, _ in members for p in dictionary.parameters())
    for i, (dictionary, settings) in enumerate(three()):
        alone, _, alone_step = trained([(dictionary, settings)], [FACTORS[i]])
        for index in range(6):
            alone_step(index)
        for (name, p), own in zip(dictionary.named_parameters(), members[i][0].parameters(), strict=True):
            assert torch.equal(p, own), f"{i} {name}"
            one, other = alone.average(p), optimizer.average(own)
            assert (one is None) == (other is None) == (settings is not SIGN)
            if one is not None and other is not None:
                assert torch.equal(one, other)


def test_several_optimizers_go_on_exactly_from_their_state() -> None:
    members = three()
    optimizer, scheduler, step = trained(members, FACTORS)
    for index in range(3):
        step(index)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), [d.state_dict() for d, _ in members]))
    again = three()
    new_optimizer, new_scheduler, new_step = trained(again, FACTORS)
    for (dictionary, _), state in zip(again, saved[2], strict=True):
        dictionary.load_state_dict(state)
    new_optimizer.load_state_dict(saved[0])
    new_scheduler.load_state_dict(saved[1])
    for index in range(3, 6):
        step(index)
        new_step(index)
    for (one, _), (other, _) in zip(members, again, strict=True):
        assert all(map(torch.equal, one.parameters(), other.parameters()))
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            if (average := optimizer.average(p)) is not None:
                assert torch.equal(average, cast(Tensor, new_optimizer.average(q)))


def test_a_closure_runs_once_with_gradients() -> None:
    for members in (three(), three()[:1]):
        optimizer = build_optimizer(members)
        calls = []

        def closure() -> Tensor:
            loss = torch.stack([p.square().sum() for d, _ in members for p in d.parameters()]).sum()  # noqa: B023
            loss.backward()
            calls.append(float(loss.detach()))  # noqa: B023
            return loss

        assert float(cast(Any, optimizer).step(closure).detach()) == calls[0]
        assert len(calls) == 1


def test_adam_alone_is_one_fused_adam() -> None:
    optimizer = build_optimizer([(Linear.tiny(), ADAM), (Linear.tiny(), ADAM)])
    assert type(optimizer) is InMemoryOrder
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]


def test_a_parameter_without_a_gradient_stays() -> None:
    for settings in (ADAM, MUON, SIGN):
        dictionary = Linear.tiny()
        optimizer = build_optimizer([(dictionary, settings)])
        before = copies(dictionary)
        set_gradients(dictionary, 0)
        dictionary.W_enc.grad = dictionary.b_enc.grad = None
        optimizer.step()
        moved = [
            name
            for (name, p), old in zip(dictionary.named_parameters(), before, strict=True)
            if not torch.equal(p, old)
        ]
        assert moved == ["W_dec", "b_dec"]


# -- rows that start again --


@pytest.mark.parametrize("settings", [ADAM, MUON, SIGN])
def test_rows_that_start_again_are_as_fresh_ones(settings: OptimizerSettings) -> None:
    dictionary = Linear.tiny()
    optimizer = build_optimizer([(dictionary, settings), (Linear.tiny(), ADAM)])
    for step in range(3):
        set_gradients(dictionary, step)
        optimizer.step()
    state = {p: copy.deepcopy(optimizer.state[p]) for p in dictionary.parameters()}
    rows, others = torch.tensor([2, 11]), [i for i in range(16) if i not in (2, 11)]
    with torch.no_grad():
        dictionary.W_enc[:, rows] = 7.0
    for p, axis in ((dictionary.W_enc, -1), (dictionary.b_enc, 0)):
        optimizer.restart_rows_(p, axis, rows)
        by_row = {
            name: (value.movedim(axis, 0), state[p][name].movedim(axis, 0))
            for name, value in optimizer.state[p].items()
            if value.shape == p.shape
        }
        assert by_row
        for name, (now, before) in by_row.items():
            fresh = p.detach().movedim(axis, 0)[rows] if name == "z" else torch.zeros_like(now[rows])
            assert torch.equal(now[rows], fresh), name
            assert torch.equal(now[others], before[others]), name
            assert now[others].any()
    if settings is SIGN:
        average = optimizer.average(dictionary.W_enc)
        assert average is not None
        torch.testing.assert_close(average[:, rows], torch.full((6, 2), 7.0))


# -- settings --


@pytest.mark.parametrize("choice", CHOICES)
def test_the_defaults_train_every_parameter(choice: str) -> None:
    for kind, sites in SITES.items():
        writes = ("c", "d") if kind is CrossLayer else sites
        dictionary = kind(5, 5, 16, TopK(4), sites, writes, skip=True)
        optimizer = build_optimizer([(dictionary, default(choice))])
        found = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, found)) == sorted(map(id, dictionary.parameters()))
        before = copies(dictionary)
        set_gradients(dictionary, 0)
        optimizer.step()
        assert not any(map(torch.equal, dictionary.parameters(), before))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Adam(0.0, 1.0, (0.9, 0.999), 1e-8, None), "optimizer.lr must be a positive number or null, got 0"),
        (lambda: Adam(None, 1.0, (0.9, 1.0), 1e-8, None), "optimizer.betas must be two numbers from 0 to below 1"),
        (lambda: Muon(0.0, 0.9, 0.0, None, 1.0, (0, 0), 1e-8, None), "optimizer.lr must be a positive number, got"),
        (lambda: Muon(0.1, 1.0, 0.0, None, 1.0, (0, 0), 1e-8, None), "momentum must be a number from 0 to below 1"),
        (lambda: Muon(0.1, 0.9, -1.0, None, 1.0, (0, 0), 1e-8, None), "weight_decay must be a finite number, at"),
        (lambda: Muon(0.1, 0.9, 0.0, -1.0, 1.0, (0, 0), 1e-8, None), "optimizer.adam_lr must be a positive number"),
        (lambda: Muon(0.1, 0.9, 0.0, None, 1.0, (0, 2), 1e-8, None), "optimizer.betas must be two numbers"),
        (lambda: SignSGD(-1.0, 1.0, 0.9), "optimizer.lr must be a positive number or null, got -1"),
        (lambda: SignSGD(None, 1.0, 1.0), "optimizer.momentum must be above 0 and below 1, got 1.0"),
        (lambda: SignSGD(None, 1.0, 0.0), "optimizer.momentum must be a positive number, got 0.0"),
    ],
)
def test_wrong_settings_are_refused(made: Callable[[], OptimizerSettings], message: str) -> None:
    with pytest.raises(DictlearnError, match=message):
        made()

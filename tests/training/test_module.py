"""K dictionaries in one Lightning run, and a run against an independent dense reference."""

import math
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor

from dictlearn.training.callbacks import Environment, LastCheckpoint, RandomState, periodic_checkpoint
from dictlearn.training.module import DictionaryTraining, Member
from dictlearn.training.optimizers.adam import InMemoryOrder
from dictlearn.types import DictlearnError
from tests.training.planted import D, PlantedStream, member


def fit(members: list[Member], n_steps: int, callbacks: list[Any] | None = None, **fit_arguments: Any) -> None:
    stream = PlantedStream(n_steps)
    module = DictionaryTraining(members, n_steps, stream.batch_size)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=n_steps,
        max_epochs=-1,
        logger=False,
        callbacks=callbacks or [],
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, stream, weights_only=True, **fit_arguments)


def weights(trained: Member) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained.learner.state_dict().items()}


def test_dictionaries_in_one_run_are_as_if_trained_alone() -> None:
    def three() -> list[Member]:
        return [
            member("a", lr=3e-3, k=4),
            member("b", lr=1e-3, k=8, clip_norm=0.01),
            member("c", writes="y", clip_norm=None),
        ]

    together = three()
    fit(together, 60)
    for i, alone in enumerate(three()):
        fit([alone], 60)
        for name, value in weights(alone).items():
            assert torch.equal(value, weights(together[i])[name]), f"{alone.learner.name} {name}"


def test_decoders_are_unit_after_every_run_and_in_every_checkpoint(tmp_path: Path) -> None:
    trained = member()
    fit([trained], 40, [periodic_checkpoint(tmp_path, 40)])
    (checkpoint,) = tmp_path.glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    norms = state["learners.0.dictionary.W_dec"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(64), atol=1e-6, rtol=0)


def test_the_newest_checkpoint_alone_is_kept(tmp_path: Path) -> None:
    fit([member()], 45, [periodic_checkpoint(tmp_path, 45)])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000044.ckpt"]


class Stop(L.Callback):
    """Ends the run in the middle of a window, as a killed process would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


@pytest.mark.parametrize("stop", [13, 50, 57, 119])
def test_resume_is_bit_identical(tmp_path: Path, stop: int) -> None:
    n_steps = 120

    def two() -> list[Member]:  # dead after 1,000 tokens, so that AuxK runs in some windows
        return [member("a", dead_after=1_000), member("b", writes="y", k=8)]

    whole = two()
    fit(whole, n_steps, [RandomState(), periodic_checkpoint(tmp_path / "whole", n_steps)])
    with pytest.raises(KeyError, match="killed"):
        fit(two(), n_steps, [Stop(stop), RandomState(), periodic_checkpoint(tmp_path / "cut", n_steps)])
    checkpoint = max((tmp_path / "cut").glob("*.ckpt"))
    resumed = two()
    fit(resumed, n_steps, [RandomState(), periodic_checkpoint(tmp_path / "cut", n_steps)], ckpt_path=checkpoint)
    for a, b in zip(whole, resumed, strict=True):
        for name, value in weights(a).items():
            assert torch.equal(value, weights(b)[name]), name


def test_training_that_diverges_is_stopped() -> None:
    broken = member(lr=1e30, clip_norm=None)
    with pytest.raises(
        DictlearnError, match=r"by step 6: x/loss.* not finite\. The loss of x is not finite since step [2-6]\."
    ):
        fit([broken], 60)


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path: Path) -> None:
    class Poison(L.Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 30:
                next(pl_module.parameters()).data.fill_(math.nan)

    with pytest.raises(
        DictlearnError,
        match=r"by step 32: .*weights of x.* not finite\. The loss of x is not finite since step 31\.",
    ):
        fit([member()], 80, [Poison(), periodic_checkpoint(tmp_path, 80)])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000024.ckpt"]


def test_a_loss_that_was_not_finite_does_not_replace_a_checkpoint(tmp_path: Path) -> None:
    """Also where the weights are finite again, as clipping to a norm of infinity leaves them."""

    class Poison(L.Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 30:
                cast(DictionaryTraining, pl_module).members[0].learner.statistics.sums[0] = math.inf

    with pytest.raises(DictlearnError, match="by step 32: loss of x not finite"):
        fit([member()], 80, [Poison(), periodic_checkpoint(tmp_path, 80)])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000024.ckpt"]


def test_the_last_step_is_saved(tmp_path: Path) -> None:
    fit([member()], 83, [LastCheckpoint(tmp_path), periodic_checkpoint(tmp_path, 83)])
    assert "step-00000083.ckpt" in [path.name for path in tmp_path.iterdir()]


# -- the reference: dense, written from the papers, sharing nothing with the package but the data and the start --


def reference_run(
    start: dict[str, Tensor], n_steps: int, scale: float, variance: float, k: int
) -> dict[str, Tensor]:
    """A dense TopK autoencoder with AuxK (Gao et al. 2024): all matrices full, dead latents judged every step."""
    p = {name: start[name].clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    mean = {name: torch.zeros_like(value) for name, value in p.items()}
    square = {name: torch.zeros_like(value) for name, value in p.items()}
    silent = torch.zeros(len(p["b_enc"]))
    stream = PlantedStream(n_steps)
    n_dead_seen = 0
    for step in range(n_steps):
        x = stream.batch(step).acts["x"] * scale
        pre = x @ p["W_enc"] + p["b_enc"]
        threshold = pre.sort(dim=-1, descending=True).values[:, k - 1 : k]
        latents = torch.where(pre >= threshold, pre, 0.0).clamp(min=0)
        recon = latents @ p["W_dec"] + p["b_dec"]
        loss = (x - recon).square().sum(-1).mean() / variance
        dead = silent >= 2_000
        n_dead_seen = max(n_dead_seen, int(dead.sum()))
        if dead.any():
            residual = (x - recon).detach()
            masked = torch.where(dead, pre, -math.inf)
            k_aux = D // 2
            kept = masked.sort(dim=-1, descending=True).values[:, min(k_aux, int(dead.sum())) - 1].unsqueeze(-1)
            auxiliary = torch.where(masked >= kept, pre, 0.0).clamp(min=0) @ p["W_dec"]
            fvu = (residual - auxiliary).square().sum() / (residual - residual.mean(0)).square().sum()
            loss = loss + fvu / 32 * min(1.0, int(dead.sum()) / k_aux)
        grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
        unit = p["W_dec"].detach()
        grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * unit).sum(-1, keepdim=True) * unit
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        rate = 3e-3 * min(1.0, (step + 1) / (n_steps // 20 + 1), (n_steps - step) / (0.2 * n_steps + 1))
        with torch.no_grad():
            for name, value in p.items():
                grad = grads[name] * min(1.0, 1.0 / (norm + 1e-6))
                mean[name] = 0.9 * mean[name] + 0.1 * grad
                square[name] = 0.999 * square[name] + 0.001 * grad**2
                first, second = mean[name] / (1 - 0.9 ** (step + 1)), square[name] / (1 - 0.999 ** (step + 1))
                value -= rate * first / (second.sqrt() + 6.25e-10)
            p["W_dec"] /= p["W_dec"].norm(dim=-1, keepdim=True)
        silent = torch.where((latents > 0).any(0), 0.0, silent + len(x))
    assert n_dead_seen > 2, "the comparison must exercise AuxK"
    return {name: value.detach() for name, value in p.items()}


def fvu_of(p: dict[str, Tensor], x: Tensor, k: int) -> float:
    pre = x @ p["W_enc"] + p["b_enc"]
    values, indices = pre.topk(k)
    recon = torch.zeros_like(pre).scatter(1, indices, values.relu()) @ p["W_dec"] + p["b_dec"]
    return float((x - recon).square().sum() / (x - x.mean(0)).square().sum())


def test_fvu_is_that_of_an_independent_dense_reference() -> None:
    n_steps, k = 800, 4
    trained = member(k=k)
    dictionary = trained.learner.dictionary
    start = {name: p.detach().clone() for name, p in dictionary.named_parameters()}
    scale, variance = float(dictionary.read_scale), float(trained.learner.variance)
    fit([trained], n_steps)
    ours = {name: p.detach() for name, p in dictionary.named_parameters()}
    reference = reference_run(start, n_steps, scale, variance, k)
    x = PlantedStream(1).sample() * scale
    before, got, expected = (fvu_of(p, x, k) for p in (start, ours, reference))
    assert expected < 0.5 * before
    assert got == pytest.approx(expected, rel=0.02)


def test_another_environment_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    state = Environment().state_dict()
    Environment().load_state_dict(state)
    assert not caplog.records
    Environment().load_state_dict({**state, "threads": 77, "torch": "1.0"})
    assert "results may differ in the last bits: torch 1.0 -> " in caplog.text
    assert "threads 77 -> " in caplog.text


def test_the_optimizer_is_adam_for_weights_in_any_order_of_memory() -> None:
    start, grads = torch.randn(5, 6, 7), [torch.randn(5, 6, 7) for _ in range(4)]
    orders = ((0, 1, 2), (1, 2, 0), (2, 1, 0))
    found = []
    for order in orders:
        back = [order.index(axis) for axis in range(3)]

        def laid_out(value: Tensor, order: tuple[int, ...] = order, back: list[int] = back) -> Tensor:
            return value.permute(order).clone(memory_format=torch.contiguous_format).permute(back)

        weight = torch.nn.Parameter(laid_out(start))
        optimizer = InMemoryOrder([weight], lr=0.1, fused=True)
        for grad in grads:
            weight.grad = laid_out(grad)
            optimizer.step()
        found.append(weight.detach())
    reference = torch.nn.Parameter(start.clone())
    plain = torch.optim.Adam([reference], lr=0.1)
    for grad in grads:
        reference.grad = grad
        plain.step()
    for weight in found:
        torch.testing.assert_close(weight, reference.detach())

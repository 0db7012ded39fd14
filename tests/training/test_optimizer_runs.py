"""Runs whose dictionaries have different optimizers: resume, checkpoints and what is trained in the end."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from dictlearn.training.callbacks import RandomState, periodic_checkpoint
from dictlearn.training.module import Member
from dictlearn.training.optimizers import Adam, Muon, SignSGD
from tests.training.planted import PlantedStream, member
from tests.training.test_module import Stop, fit, weights


def several() -> list[Member]:
    """Four dictionaries of three optimizers; dead after 1,000 tokens, so that AuxK runs in some windows."""
    rest = ((0.9, 0.999), 6.25e-10, 1.0)
    settings = [
        SignSGD(5e-3, 1.0, 0.95),
        Muon(1e-2, 0.95, 0.0, 1e-3, 1.0, *rest),
        Adam(3e-3, 1.0, *rest),
        SignSGD(1e-3, 1.0, 0.9),
    ]
    made = [member(name, writes="y" if name == "d" else "x", dead_after=1_000) for name in "abcd"]
    return [m._replace(optimizer=optimizer) for m, optimizer in zip(made, settings, strict=True)]


@pytest.mark.parametrize("stop", [13, 59])
def test_a_run_of_several_optimizers_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    whole, resumed = several(), several()
    fit(whole, 60, [RandomState(), periodic_checkpoint(tmp_path / "whole", 60)])
    with pytest.raises(KeyError, match="killed"):
        fit(several(), 60, [Stop(stop), RandomState(), periodic_checkpoint(tmp_path / "cut", 60)])
    checkpoint = max((tmp_path / "cut").glob("*.ckpt"))
    fit(resumed, 60, [RandomState(), periodic_checkpoint(tmp_path / "cut", 60)], ckpt_path=checkpoint)
    for a, b in zip(whole, resumed, strict=True):
        for name, value in weights(a).items():
            assert torch.equal(value, weights(b)[name]), name


def test_dictionaries_of_several_optimizers_are_as_if_trained_alone() -> None:
    together = several()
    fit(together, 40)
    for alone, other in zip(several(), together, strict=True):
        fit([alone], 40)
        for name, value in weights(alone).items():
            assert torch.equal(value, weights(other)[name]), f"{alone.learner.name} {name}"


class Averages(L.Callback):
    """The averages at the end of a step, by the definition: what y = (1 - b) z + b x gives, on the unit sphere."""

    def __init__(self, step: int) -> None:
        self.step, self.W_dec = step, torch.empty(0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            y = pl_module.members[0].learner.dictionary.W_dec
            z = trainer.optimizers[0].state[y]["z"]
            self.W_dec = torch.nn.functional.normalize((y.detach() - 0.05 * z) / 0.95, dim=-1)


def test_checkpoints_and_the_end_of_a_run_have_the_averages(tmp_path: Path) -> None:
    trained, last, at_checkpoint = several()[:1], Averages(45), Averages(44)
    fit(trained, 45, [last, at_checkpoint, periodic_checkpoint(tmp_path, 45)])
    (path,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 44
    name = "learners.0.dictionary.W_dec"
    torch.testing.assert_close(checkpoint["state_dict"][name], at_checkpoint.W_dec)
    assert (checkpoint["trained_weights"][name] - at_checkpoint.W_dec).abs().max() > 1e-3
    torch.testing.assert_close(trained[0].learner.dictionary.W_dec.detach(), last.W_dec)
    again = several()[:1]  # of a run that had ended: nothing is left to train
    fit(again, 44, ckpt_path=path)
    assert torch.equal(again[0].learner.dictionary.W_dec, checkpoint["state_dict"][name])


def test_a_run_that_averages_learns() -> None:
    trained = several()
    x = PlantedStream(1).sample()
    before = [fvu(m, x) for m in trained[:3]]
    fit(trained[:3], 150)
    assert all(fvu(m, x) < 0.7 * b for m, b in zip(trained[:3], before, strict=True))


def fvu(trained: Member, x: Tensor) -> float:
    recon = trained.learner.dictionary(x).recon
    return float((x - recon).square().sum() / (x - x.mean(0)).square().sum())

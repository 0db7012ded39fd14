"""The threshold that BatchTopK has at inference, in runs."""

from pathlib import Path

import lightning as L
import pytest
import torch

from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.training.callbacks import RandomState, periodic_checkpoint
from dictlearn.training.module import Member
from tests.training.planted import PlantedStream, member
from tests.training.test_module import Stop, fit, weights


@pytest.mark.parametrize("n_steps", [50, 200])
@pytest.mark.parametrize("k", [3, 8])
def test_l0_at_inference_is_k_after_a_short_run(n_steps: int, k: int) -> None:
    """The threshold moves fast in such a run: a mean over most of it gives up to 1.4 k latents."""
    trained = member(sparsifier=BatchTopK(k))
    fit([trained], n_steps)
    held_out = PlantedStream(1).sample()
    latents = trained.learner.dictionary.for_inference().encode(held_out)
    l0 = float((latents != 0).sum(-1).double().mean())
    assert l0 == pytest.approx(k, rel=0.1)


@pytest.mark.parametrize("stop", [13, 57])
def test_it_resumes_to_the_bit(tmp_path: Path, stop: int) -> None:
    n_steps = 120

    def run(trained: Member, folder: str, *more: L.Callback, **arguments: Path) -> Member:
        saved = periodic_checkpoint(tmp_path / folder, n_steps)
        fit([trained], n_steps, [*more, RandomState(), saved], **arguments)
        return trained

    whole = run(member(sparsifier=BatchTopK(4)), "whole")
    with pytest.raises(KeyError, match="killed"):
        run(member(sparsifier=BatchTopK(4)), "cut", Stop(stop))
    checkpoint = max((tmp_path / "cut").glob("*.ckpt"))
    resumed = run(member(sparsifier=BatchTopK(4)), "cut", ckpt_path=checkpoint)
    assert weights(whole)["dictionary.sparsifier.n_seen"] == n_steps
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(whole)[name]), name

"""The stream inside Lightning: the LM stays outside, an interrupted run sees exactly the rest."""

import math
from functools import partial

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dictlearn.data import ActivationData, LocalText, Sequences
from dictlearn.lm import LM, load_lm, resolve
from dictlearn.types import DictlearnError
from tests.data.helpers import random_documents
from tests.tiny_lms import tiny_lm_folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("lm"), vocab=410)), dtype="float32")


@pytest.fixture
def data(lm, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(random_documents(400)) + "\n")

    def make(n_tokens=1000, seed=0, stream="shuffled", **changes):
        sizes = {"ctx": 16, "lm_batch_rows": 4, "block_rows": 8, "n_slices": 3, **changes}
        text = LocalText(path=str(path), cache_dir=str(tmp_path / "cache"), **sizes)
        sites = [resolve(lm.model, "resid_post.1"), resolve(lm.model, "mlp_out.0")]
        return ActivationData(text, lm, sites, batch_size=50, n_tokens=n_tokens, seed=seed, stream=stream)

    return make


class Recorder(LightningModule):
    """Trains one weight; keeps what it saw."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))
        self.stop_at, self.seen = stop_at, []

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def training_step(self, batch, _):
        if isinstance(batch, Sequences):
            batch = batch.flat()
        self.seen.append((batch.tokens.clone(), batch.rows.clone(), batch.acts["resid_post.1"].clone()))
        if len(self.seen) - 1 == self.stop_at:
            raise RuntimeError("interrupted")
        return ((batch.acts["mlp_out.0"] * self.weight).sum(-1) - 1).square().mean()


def fit(model, data, folder, ckpt_path=None):
    trainer = Trainer(
        max_steps=20,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(dirpath=folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")],
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("ratio", [None, 1.05])
@pytest.mark.parametrize("stream", ["shuffled", "sequences"])
def test_an_interrupted_run_sees_exactly_the_remaining_batches(data, tmp_path, stream, ratio):
    data = partial(data, stream=stream, max_norm_ratio=ratio)
    if ratio is not None:
        assert data().statistics(300)["mlp_out.0"].n_filtered > 50, "some tokens are left out, not all"
    whole = fit(Recorder(), data(), tmp_path / "whole")
    assert len(whole.seen) == 20
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(Recorder(stop_at=13), data(), tmp_path / "cut")
    for step in (4, 12):
        rest = fit(Recorder(), data(), tmp_path / f"rest{step}", tmp_path / "cut" / f"step={step}.ckpt")
        assert len(rest.seen) == 20 - step
        for one, other in zip(rest.seen, whole.seen[step:], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
        assert torch.equal(rest.weight, whole.weight)


def test_the_lm_is_in_no_checkpoint(data, tmp_path):
    fit(Recorder(), data(), tmp_path)
    checkpoint = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"weight"}
    assert (tmp_path / "step=20.ckpt").stat().st_size < 20_000


def test_activations_are_those_of_the_lm(data, lm):
    """Computed again from the row of each activation, by the whole model with its own hidden states."""
    made = data()
    for _, batch in zip(range(3), made.train_dataloader(), strict=False):
        rows = made.store.take(batch.rows.numpy())
        assert torch.equal(rows[torch.arange(50), batch.positions], batch.tokens)
        with torch.no_grad():
            hidden = lm.model(rows, output_hidden_states=True).hidden_states[2]
        expected = hidden[torch.arange(50), batch.positions]
        torch.testing.assert_close(batch.acts["resid_post.1"], expected, rtol=1e-4, atol=1e-4)


def test_whole_contexts_are_those_of_the_lm(data, lm):
    made = data(stream="sequences", n_tokens=300)
    batches = list(made.train_dataloader())
    assert len(batches) == len(made.train_dataloader()) == math.ceil(300 / 45), "50 // 16 rows of 15 counted tokens"
    for batch in batches:
        with torch.no_grad():
            hidden = lm.model(batch.tokens, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(batch.acts["resid_post.1"], hidden, rtol=1e-4, atol=1e-4)
        assert torch.equal(made.store.take(batch.rows.numpy()), batch.tokens)


def test_an_unknown_stream_is_refused(data):
    with pytest.raises(DictlearnError, match="stream must be one of shuffled, sequences, got 'rows'"):
        data(stream="rows")


def test_one_pass_for_the_limits_and_none_without_a_ratio(data):
    """The limits are of the first N_MEDIAN tokens, however many the statistics are of."""
    assert data(max_norm_ratio=None).norm_filter is None
    one, other = data(), data()
    one.statistics(300)
    assert one.norm_filter == other.norm_filter
    assert one.norm_filter.ratio == 10.0
    assert set(one.norm_filter.limits) == {"resid_post.1", "mlp_out.0"}


def test_statistics_and_seeds(data):
    first = data()
    statistics = first.statistics(500)
    assert set(statistics) == {"resid_post.1", "mlp_out.0"}
    assert statistics["mlp_out.0"].mean.shape == (16,)
    one, same_seed, other = (next(iter(d.train_dataloader())).tokens for d in (first, data(), data(seed=1)))
    assert torch.equal(one, same_seed)
    assert not torch.equal(one, other)


def test_heldout_rows_are_not_trained_on(data):
    made = data()
    heldout = made.heldout(300)
    assert heldout.info["n_tokens"] >= 300
    assert isinstance(made.lm, LM)


def test_the_seed_orders_the_batches_and_nothing_else_does(data):
    def tokens(seed):
        return torch.cat([batch.tokens for batch in data(seed=seed).train_dataloader()])

    assert torch.equal(tokens(1), tokens(1))
    assert not torch.equal(tokens(1), tokens(2))


def test_training_and_held_out_rows_share_no_document(data):
    made = data()
    trained = {tuple(row) for row in made.store.rows(0, made.store.wait(10**9)).tolist()}
    heldout = made.heldout(200).tokens
    assert len(heldout) > 0
    words = {tuple(row[start : start + 6]) for row in trained for start in range(1, 10)}
    assert not words & {tuple(row[start : start + 6]) for row in heldout.tolist() for start in range(1, 10)}

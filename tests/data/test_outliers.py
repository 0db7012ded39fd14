"""Tokens with huge, infinite or NaN activations: at counted places left out, at other places without effect."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dictlearn.data import (
    ActivationData,
    ActivationStream,
    NormFilter,
    Sequences,
    SequenceStream,
    estimate_norm_filter,
    estimate_statistics,
    schedule,
)
from dictlearn.types import DictlearnError
from tests.data.helpers import BOS, Reader, bos_tokenizer, make_stream, same, unique_store

BAD = {"huge": 1e6, "nan": float("nan"), "inf": float("inf")}


def masked(token):
    return token % 11 == 0


def is_outlier(tokens):
    return (tokens % 7 == 0) & (tokens != BOS)


def clean(tokens):
    """Sites of norm about 3 and 30, the token id readable from site "a"."""
    x = torch.stack([3 + tokens.sin(), tokens.cos(), tokens / 1e6], dim=-1)
    return {"a": x, "b": 30 + tokens[..., None].cos().expand(*tokens.shape, 4)}


def planted(tokens, value, where=is_outlier, site="b"):
    acts = dict(clean(tokens))
    acts[site] = acts[site].masked_fill(where(tokens)[..., None], value)
    return acts


@pytest.fixture
def store(tmp_path):
    return unique_store(tmp_path / "store", n_rows=50, ctx=8, masked=masked)


LIMITS = NormFilter(10.0, {"a": 40.0, "b": 600.0})


def stream(store, read, norm_filter, **changes):
    sizes = {"batch_size": 7, "seed": 3, "lm_batch_rows": 3, "block_rows": 4, "n_slices": 3, "n_tokens": 400}
    return ActivationStream(read, store, norm_filter=norm_filter, **{**sizes, **changes})


@pytest.mark.parametrize("site", ["a", "b"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_the_stream_is_the_clean_one_without_those_tokens(store, value, site):
    """The order of what is kept is that of the whole schedule with the outliers taken out of it."""
    n_all = 700
    every = torch.cat([batch.tokens for batch in stream(store, clean, None, n_tokens=n_all)])
    expected = every[~is_outlier(every)][: len(every) // 7 * 5]
    found = list(stream(store, partial(planted, value=value, site=site), LIMITS, n_tokens=len(expected) + 60))
    assert torch.cat([batch.tokens for batch in found])[: len(expected)].equal(expected)
    assert {len(batch.tokens) for batch in found} == {7}
    for batch in found:
        for name, acts in clean(batch.tokens).items():
            assert torch.equal(batch.acts[name], acts)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_masked_places_have_no_effect(store, value):
    def read(tokens):
        return planted(tokens, value, where=lambda t: t == BOS)

    for norm_filter in (LIMITS, None):
        pairs = zip(stream(store, read, norm_filter), stream(store, clean, norm_filter), strict=True)
        assert all(same(one, other) for one, other in pairs)
        one, other = (estimate_statistics(r, store, 200, 3, norm_filter) for r in (read, clean))
        assert all(same_statistics(one[site], other[site]) for site in one)
    assert estimate_norm_filter(read, store, 10.0) == estimate_norm_filter(clean, store, 10.0)


def same_statistics(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("batch_size", [7, 50])
def test_resume_at_every_batch(store, batch_size):
    read = partial(planted, value=float("nan"))
    whole = stream(store, read, LIMITS, batch_size=batch_size)
    states, batches = [whole.state_dict()], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state_dict())
    for done, state in enumerate(states):
        resumed = stream(store, read, LIMITS, batch_size=batch_size)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert all(same(one, other) for one, other in zip(resumed, batches[done:], strict=True))


@pytest.mark.parametrize("n_tokens", [50, 266, 500])
def test_less_than_one_block_is_read_for_nothing(store, n_tokens):
    reader = Reader()

    def read(tokens):
        reader(tokens)
        return planted(tokens, 1e6)

    made = stream(store, read, LIMITS, n_tokens=n_tokens)
    n_used = sum(len(batch.tokens) for batch in made)
    rows = np.concatenate([np.arange(50), *(schedule.permutation(3, "epoch", e, 50) for e in (1, 2))])
    tokens = store.take(rows)
    n_kept = ((tokens != BOS) & ~is_outlier(tokens)).sum(1).cumsum(0)
    n_rows = int((n_kept < n_used).sum()) + 1
    assert n_rows <= reader.n_rows < n_rows + 4


def test_a_filter_that_leaves_everything_changes_nothing(store):
    generous = NormFilter(10.0, {"a": 1e9, "b": 1e9})
    pairs = zip(stream(store, clean, generous), stream(store, clean, None), strict=True)
    assert all(same(one, other) for one, other in pairs)


def test_the_position_is_of_one_ratio(store):
    state = stream(store, clean, LIMITS).state_dict()
    stream(store, clean, NormFilter(10, {"a": 41.0, "b": 600.0})).load_state_dict(state)
    for other in (None, LIMITS._replace(ratio=11.0)):
        with pytest.raises(DictlearnError, match=r"data.max_norm_ratio that it began with"):
            stream(store, clean, other).load_state_dict(state)


@pytest.mark.parametrize("kind", [partial(stream, batch_size=7), lambda s, r, f: sequences(s, r, f)])
def test_a_filter_that_leaves_nothing_ends_the_stream(store, kind):
    with pytest.raises(DictlearnError, match=r"max_norm_ratio = 10.0 must leave .* 16 groups in a row .*a: 40"):
        list(kind(store, partial(planted, value=float("nan"), where=lambda t: t != BOS), LIMITS))
    with pytest.raises(DictlearnError, match=r"max_norm_ratio = 10.0 must leave .* every one of .*b: 600"):
        estimate_statistics(partial(planted, value=1e6, where=lambda t: t != BOS), store, 200, 3, LIMITS)


def sequences(store, read, norm_filter, **changes):
    sizes = {"batch_size": 24, "seed": 3, "lm_batch_rows": 2, "n_tokens": 400}
    return SequenceStream(read, store, norm_filter=norm_filter, **{**sizes, **changes})


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_sequences_mask_them(store, value):
    for batch in sequences(store, partial(planted, value=value), LIMITS):
        assert torch.equal(batch.mask, (batch.tokens != BOS) & ~is_outlier(batch.tokens))
        flat = batch.flat()
        assert torch.equal(flat.tokens, batch.tokens[batch.mask])
        assert torch.equal(flat.acts["b"], clean(flat.tokens)["b"])


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_statistics_are_those_of_the_tokens_that_are_kept(store, value):
    found = estimate_statistics(partial(planted, value=value), store, 10_000, 3, LIMITS)
    tokens = store.rows(0, 50)
    counted = tokens[tokens != BOS]
    for site, acts in clean(counted[~is_outlier(counted)]).items():
        x = acts.double().numpy()
        assert found[site].n_tokens == len(x)
        assert found[site].n_filtered == len(counted) - len(x) > 20
        assert found[site].mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-6)
        np.testing.assert_allclose(found[site].mean.numpy(), x.mean(0), rtol=1e-6)
        assert found[site].variance == pytest.approx(((x - x.mean(0)) ** 2).sum(1).mean(), rel=1e-4)
        spread = x.std(1, keepdims=True, ddof=1) + 1e-5
        z = (x - x.mean(1, keepdims=True)) / spread
        np.testing.assert_allclose(found[site].layer_norm_mean.numpy(), z.mean(0), atol=1e-6)
        expected = ((z - z.mean(0)) ** 2).sum(1).mean()
        assert found[site].layer_norm_variance == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_limits_are_medians_of_all_counted_tokens(store, value):
    norm_filter = estimate_norm_filter(partial(planted, value=value), store, 4.0, lm_batch_rows=3)
    tokens = store.rows(0, 50)
    counted = tokens[tokens != BOS]
    for site, acts in clean(counted).items():
        norms = acts.double().norm(dim=-1)
        if site == "b":
            norms[is_outlier(counted)] = float("inf")  # the largest, whatever they are
        median = norms.sort().values[(len(norms) - 1) // 2]
        assert norm_filter.limits[site] == pytest.approx(4 * float(median), rel=1e-6)
        found = estimate_statistics(partial(planted, value=value), store, 10_000, 3, norm_filter)[site]
        assert found.median_norm == pytest.approx(float(median), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_an_error_where_they_are_kept(store, value):
    with pytest.raises(DictlearnError, match=r"activations at b must be finite, but some of .*max_norm_ratio=10"):
        estimate_statistics(partial(planted, value=value), store, 200)
    with pytest.raises(DictlearnError, match="activations at b must be finite, but most of"):
        estimate_norm_filter(partial(planted, value=value, where=lambda t: t != BOS), store, 10.0)


def test_half_precision_norms_do_not_overflow():
    acts = {"x": torch.full((3, 8), 40_000.0, dtype=torch.float16)}  # the square is beyond float16
    assert NormFilter(2.0, {"x": 113_138.0}).keep(acts).all()
    assert not NormFilter(2.0, {"x": 113_136.0}).keep(acts).any()


def test_unfiltered_streams_are_as_before(store):
    assert all(same(a, b) for a, b in zip(make_stream(store, 300), make_stream(store, 300), strict=True))


def test_data_filters_what_the_text_says(store, monkeypatch):
    """ActivationData: median first, then statistics and stream, for both kinds of stream."""

    class Text:
        lm_batch_rows, block_rows, n_slices, max_norm_ratio, store = 3, 4, 3, 10.0, None

    for kind in ("shuffled", "sequences"):
        data = ActivationData.__new__(ActivationData)
        lm = SimpleNamespace(tokenizer=bos_tokenizer())
        sizes = {"batch_size": 24, "n_tokens": 300, "seed": 0}
        for key, value in {"text": Text(), "lm": lm, "stream": kind, **sizes}.items():
            setattr(data, key, value)
        data.store = store
        monkeypatch.setattr(ActivationData, "read", lambda _, tokens: planted(tokens, 1e6))
        assert data.statistics(200)["a"].n_filtered > 10
        assert data.norm_filter == estimate_norm_filter(data.read, store, 10.0)
        for batch in data.train_dataloader():
            tokens = batch.tokens[batch.mask] if isinstance(batch, Sequences) else batch.tokens
            assert len(tokens)
            assert not is_outlier(tokens).any()

import numpy as np
import pytest
import torch

from dictlearn.data.normalize import estimate_statistics
from dictlearn.types import DictlearnError
from tests.data.helpers import make_stream, same, unique_store


def read(tokens):
    x = torch.stack([tokens.sin(), 1000 + tokens.cos(), tokens * 0.01], dim=-1)
    return {"x": x, "half": x.bfloat16()}


@pytest.fixture
def store(tmp_path):
    return unique_store(tmp_path / "store", n_rows=40, ctx=8, masked=lambda token: token % 5 == 0)


@pytest.mark.parametrize("n_tokens", [1, 50, 10_000])
def test_statistics_equal_their_definition(store, n_tokens):
    rows = store.rows(0, 40)
    n_rows = next((n for n in range(1, 41) if (rows[:n] > 0).sum() >= n_tokens), 40)
    for site, found in estimate_statistics(read, store, n_tokens, lm_batch_rows=3).items():
        x = read(rows[:n_rows])[site].double().numpy()[rows[:n_rows].numpy() > 0]
        assert found.n_tokens == len(x)
        assert found.mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-12)
        np.testing.assert_allclose(found.mean.numpy(), x.mean(0), rtol=1e-12)
        assert found.variance == pytest.approx(((x - x.mean(0)) ** 2).sum(1).mean(), rel=1e-6)


def test_the_stream_does_not_move(store):
    expected = list(make_stream(store, n_tokens=300))
    stream = make_stream(store, n_tokens=300)
    for i, batch in enumerate(stream):
        assert same(batch, expected[i])
        before = stream.state_dict()
        estimate_statistics(stream.read, store, 64)
        assert stream.state_dict() == before


def test_no_counted_token_is_an_error(tmp_path):
    store = unique_store(tmp_path / "store", n_rows=3, ctx=8, masked=lambda _: True)
    with pytest.raises(DictlearnError, match="at least one counted token"):
        estimate_statistics(read, store)


def test_covariances_are_those_of_the_sites_that_ask(store):
    found = estimate_statistics(read, store, 200, lm_batch_rows=3, covariances=["x"])
    rows = store.rows(0, 40)
    n_rows = next(n for n in range(1, 41) if (rows[:n] > 0).sum() >= 200)
    x = read(rows[:n_rows])["x"].double().numpy()[rows[:n_rows].numpy() > 0]
    z = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    for covariance, values in ((found["x"].covariance, x), (found["x"].layer_norm_covariance, z)):
        np.testing.assert_allclose(np.asarray(covariance), np.cov(values.T, ddof=0), atol=1e-8)
    assert found["half"].covariance is found["half"].layer_norm_covariance is None

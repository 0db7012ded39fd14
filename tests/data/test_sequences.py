"""Whole contexts: the rows in the order of the schedule, their activations in place."""

import json
import math
from itertools import islice

import pytest
import torch

from dictlearn.data import SequenceStream, schedule
from dictlearn.types import DictlearnError
from tests.data.helpers import BOS, Reader, unique_store

CTX = 8


def masked(token):
    return token % 11 == 0


@pytest.fixture
def store(tmp_path):
    return unique_store(tmp_path / "store", n_rows=23, ctx=CTX, masked=masked)


def make(store, n_tokens=500, **changes):
    sizes = {"batch_size": 45, "seed": 3, "lm_batch_rows": 2}
    return SequenceStream(Reader(), store, n_tokens=n_tokens, **{**sizes, **changes})


def equal(one, other):
    pairs = zip([*one.acts.values(), *one[1:]], [*other.acts.values(), *other[1:]], strict=True)
    return list(one.acts) == list(other.acts) and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("batch_size", "n_rows"), [(45, 5), (40, 5), (39, 4), (8, 1), (3, 1)])
def test_rows_come_in_the_order_of_their_epochs(store, batch_size, n_rows):
    stream = make(store, batch_size=batch_size)
    batches = list(stream)
    assert len(batches) == len(stream) == math.ceil(500 / (n_rows * (CTX - 1)))
    rows = torch.cat([batch.rows for batch in batches]).tolist()
    assert {len(batch.rows) for batch in batches} == {n_rows}
    later = [row for e in range(1, 6) for row in schedule.permutation(3, "epoch", e, 23).tolist()]
    assert rows == [*range(23), *later][: len(rows)]
    assert len(rows) > 2 * 23


def test_activations_tokens_and_mask_are_in_their_places(store):
    for batch in make(store):
        expected = store.take(batch.rows.numpy())
        assert torch.equal(batch.tokens, expected)
        assert torch.equal(batch.mask, expected != BOS)
        assert torch.equal(batch.acts["a"][..., 0], expected.double())
        assert torch.equal(batch.acts["a"][..., 1], expected[:, 1:2].expand(-1, CTX).double())
        assert torch.equal(batch.acts["b"][..., 0], -expected.double())


def test_flat_is_the_counted_activations(store):
    for batch in make(store):
        flat = batch.flat()
        places = [(i, p) for i in range(len(batch.rows)) for p in range(CTX) if batch.mask[i, p]]
        assert flat.tokens.tolist() == [int(batch.tokens[place]) for place in places]
        assert flat.rows.tolist() == [int(batch.rows[i]) for i, _ in places]
        assert flat.positions.tolist() == [p for _, p in places]
        for site, acts in flat.acts.items():
            assert torch.equal(acts, torch.stack([batch.acts[site][place] for place in places]))


def test_resume_at_every_batch_gives_the_same_batches_at_once(store):
    stream = make(store)
    states, batches = [stream.state_dict()], []
    for batch in stream:
        batches.append(batch)
        states.append(stream.state_dict())
    for done, state in enumerate(states):
        resumed = make(store)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        first = next(iter(resumed), None)
        assert isinstance(resumed.read, Reader)
        assert resumed.read.n_rows == (5 if first is not None else 0), "no row is run again"
        resumed.load_state_dict(state)
        rest = list(resumed)
        assert len(rest) == len(batches) - done
        assert all(equal(one, other) for one, other in zip(rest, batches[done:], strict=True))


def test_a_state_of_something_else_is_refused(store):
    state = make(store).state_dict()
    for change in ("seed", "batch_size", "lm_batch_rows"):
        with pytest.raises(DictlearnError, match="A stream continues with"):
            make(store, **{change: 17}).load_state_dict(state)


def test_rows_of_which_nothing_counts_are_passed_over(tmp_path):
    store = unique_store(tmp_path / "store", n_rows=20, ctx=CTX, masked=lambda t: (t - 1) // CTX in (3, 4, 11))
    batches = list(make(store, n_tokens=150, batch_size=CTX))
    assert len(batches) == math.ceil(150 / 7)
    rows = [int(batch.rows) for batch in batches]
    assert rows[:17] == [r for r in range(20) if r not in (3, 4, 11)]
    stream = make(store, n_tokens=150, batch_size=CTX)
    list(islice(stream, 3))
    resumed = make(store, n_tokens=150, batch_size=CTX)
    resumed.load_state_dict(stream.state_dict())
    assert [int(batch.rows) for batch in resumed] == rows[3:]
    everything = unique_store(tmp_path / "masked", n_rows=9, ctx=CTX, masked=lambda _: True)
    with pytest.raises(DictlearnError, match="no counted token"):
        list(make(everything))


def test_activations_can_be_trained_on(store):
    """Those of an LM under inference_mode could not be saved for backward."""

    def read(tokens):
        with torch.inference_mode():
            return {"x": torch.ones(*tokens.shape, 5, dtype=torch.bfloat16)}

    batch = next(iter(SequenceStream(read, store, batch_size=16, n_tokens=12)))
    for acts in (batch.acts["x"], batch.flat().acts["x"]):
        assert acts.dtype == torch.bfloat16
        weight = torch.ones(5, 1, dtype=torch.bfloat16, requires_grad=True)
        (acts @ weight).sum().backward()
        assert weight.grad is not None

import json
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from dictlearn.data import schedule
from dictlearn.data.pool import Pool
from dictlearn.data.stream import ActivationStream
from dictlearn.types import DictlearnError
from tests.data.helpers import BOS, Reader, make_stream, pool_of, same, unique_store


def masked(token):
    return token % 11 == 0


@pytest.fixture
def store(tmp_path):
    return unique_store(tmp_path / "store", n_rows=50, ctx=8, masked=masked)


def slow_order(store, n_tokens, seed=3, block_rows=4, n_slices=3):
    """Token ids in the order of use: the whole schedule with lists, no pool, straight from its definition."""
    rows = store.rows(0, store.n_rows).tolist()
    entries, used, block_slices = [], [], []
    epoch = 0
    while sum(len(part) for cut in block_slices for part in cut) < n_tokens:
        while len(entries) < block_rows * (len(block_slices) + 1):
            order = range(len(rows)) if epoch == 0 else schedule.permutation(seed, "epoch", epoch, len(rows))
            entries += [rows[i] for i in order]
            epoch += 1
        b = len(block_slices)
        tokens = [t for row in entries[b * block_rows : (b + 1) * block_rows] for t in row if t != BOS]
        tokens = [tokens[i] for i in schedule.permutation(seed, "block", b, len(tokens))]
        size, extra = divmod(len(tokens), n_slices)
        ends = np.cumsum([0] + [size + (r < extra) for r in range(n_slices)])
        block_slices.append([tokens[ends[r] : ends[r + 1]] for r in range(n_slices)])
    for g in range(len(block_slices) + n_slices - 1):
        group = [t for r in range(n_slices) if 0 <= g - r < len(block_slices) for t in block_slices[g - r][r]]
        used += [group[i] for i in schedule.permutation(seed, "group", g, len(group))]
    return used[:n_tokens]


@pytest.mark.parametrize(
    "sizes",
    [{}, {"batch_size": 1}, {"batch_size": 60}, {"n_slices": 1}, {"block_rows": 1, "n_slices": 5}, {"seed": 4}],
)
def test_batches_follow_the_schedule(store, sizes):
    stream = make_stream(store, n_tokens=700, **sizes)
    batches = list(stream)
    tokens = torch.cat([batch.tokens for batch in batches])
    used = {key: value for key, value in sizes.items() if key != "batch_size"}
    assert tokens.tolist() == slow_order(store, len(tokens), **used)
    assert len(batches) == len(stream) == math.ceil(700 / stream.batch_size)
    assert {len(batch.tokens) for batch in batches} == {stream.batch_size}


def test_activations_tokens_rows_and_positions_belong_together(store):
    for batch in make_stream(store, n_tokens=900):
        assert torch.equal(batch.tokens, 1 + batch.rows * store.ctx + batch.positions)
        assert torch.equal(batch.acts["a"][:, 0], batch.tokens.double())
        assert torch.equal(batch.acts["b"][:, 0], -batch.tokens.double())
        first = store.take(batch.rows.numpy())[:, 1]
        assert torch.equal(batch.acts["a"][:, 1], first.double())


@pytest.mark.parametrize("sizes", [{}, {"n_slices": 8}, {"block_rows": 1}, {"batch_size": 50}, {"n_slices": 1}])
@pytest.mark.parametrize("n_tokens", [1, 20, 21, 33, 315, 600])
def test_less_than_one_block_is_read_for_nothing(store, n_tokens, sizes):
    stream = make_stream(store, n_tokens, **sizes)
    stream.read = read = Reader()
    n_used = sum(len(batch.tokens) for batch in stream)
    n_counted = (store.take(schedule.row_order(3, 0, 150, 50)) != BOS).sum(1).cumsum(0)
    n_rows = int((n_counted < n_used).sum()) + 1
    assert n_rows <= read.n_rows < n_rows + stream.block_rows


def test_all_that_was_read_can_be_used(tmp_path):
    """64 rows of 7 counted tokens are 16 blocks; of all of them, as many as are needed, each is used once."""
    store = unique_store(tmp_path / "store", n_rows=64, ctx=8)
    stream = make_stream(store, n_tokens=64 * 7, n_slices=5)
    stream.read = read = Reader()
    used = sorted(t for batch in stream for t in batch.tokens.tolist())
    assert used == sorted(t for t in store.rows(0, 64).flatten().tolist() if t != BOS)
    assert read.n_rows == 64
    assert stream.state_dict()["n_blocks"] == 16
    assert stream.state_dict()["group"] == 16 + 5 - 1


def test_every_counted_token_once_per_epoch(tmp_path):
    """32 rows are 8 blocks; when group 8 * 5 + 1 has been used, blocks 0 to 39 = 5 epochs are used up."""
    store = unique_store(tmp_path / "store", n_rows=32, ctx=8, masked=masked)
    counted = [t for t in store.rows(0, 32).flatten().tolist() if t != BOS]
    stream = make_stream(store, n_tokens=6 * len(counted), batch_size=1)
    seen: Counter[int] = Counter()
    for batch in stream:
        seen[int(batch.tokens)] += 1
        if stream.state_dict()["group"] == 8 * 5 + 2:
            break
    assert set(seen) == set(counted)
    assert set(seen.values()) <= {5, 6}, "5 epochs whole, a part of the sixth"
    fewer = Counter(t for batch in islice(stream, len(counted)) for t in batch.tokens.tolist())
    assert set(fewer.values()) == {1, 2} or set(fewer.values()) == {1}


def test_mixing_is_that_of_the_closed_form(tmp_path):
    """Two activations of a batch share a row with probability (1 + 1/R) L / 2M at M = S L (R + 1) / 2 alive."""
    ctx, block_rows, n_slices, batch_size = 32, 64, 8, 256
    store = unique_store(tmp_path / "store", n_rows=4000, ctx=ctx)
    stream = make_stream(
        store, n_tokens=64_000, batch_size=batch_size, lm_batch_rows=64, block_rows=block_rows, n_slices=n_slices
    )
    shared, distinct = [], []
    for batch in stream:
        if stream.state_dict()["group"] < n_slices:
            continue  # the first groups mix fewer blocks
        if stream.state_dict()["group"] > stream.state_dict()["n_blocks"] - 1:
            break  # and so do the last
        _, counts = batch.rows.unique(return_counts=True)
        shared.append(float((counts * (counts - 1)).sum()) / (batch_size * (batch_size - 1)))
        distinct.append(len(counts))
    alive = block_rows * ctx * (n_slices + 1) / 2
    p = (1 + 1 / n_slices) * ctx / (2 * alive)
    p *= 1 - 1 / (ctx - 1)  # a row's counted activations are used without replacement
    assert len(shared) > 150
    assert np.mean(shared) == pytest.approx(p, rel=0.03)
    n = block_rows * n_slices  # rows of which a group takes activations, equally
    assert np.mean(distinct) == pytest.approx(n * (1 - (1 - 1 / n) ** batch_size), rel=0.02)


def test_freed_slots_are_not_read_and_living_ones_not_written(store, monkeypatch):
    free = Pool._free

    def poison(pool, block, index):
        slot, _ = pool.alive[block, index]
        places = slice(slot * pool.slot_size, (slot + 1) * pool.slot_size)
        for acts in pool.acts.values():
            acts[places] = float("nan")
        pool.origin[places] = -1
        free(pool, block, index)

    expected = list(make_stream(store, n_tokens=1500))
    monkeypatch.setattr(Pool, "_free", poison)
    stream = make_stream(store, n_tokens=1500)
    assert all(same(one, other) for one, other in zip(stream, expected, strict=True))
    pool = pool_of(stream)
    slots = [slot for slot, _ in pool.alive.values()] + pool.free_slots
    assert sorted(slots) == list(range(6)), "3 * 4 / 2 slots, each free or alive"


def test_the_pool_is_allocated_once(store):
    stream = make_stream(store, n_tokens=300)
    batches = iter(stream)
    next(batches)
    places = {site: acts.data_ptr() for site, acts in pool_of(stream).acts.items()}
    kept = next(batches)
    copy = [kept.acts["a"].clone(), kept.tokens.clone()]
    list(batches)
    list(stream)
    assert places == {site: acts.data_ptr() for site, acts in pool_of(stream).acts.items()}
    assert torch.equal(kept.acts["a"], copy[0])
    assert torch.equal(kept.tokens, copy[1]), "a batch stays as it is"


@pytest.mark.parametrize("batch_size", [7, 50])
def test_resume_at_every_batch_gives_the_same_batches(store, batch_size):
    stream = make_stream(store, n_tokens=420, batch_size=batch_size)
    states, batches = [stream.state_dict()], []
    for batch in stream:
        batches.append(batch)
        states.append(stream.state_dict())
    for done, state in enumerate(states):
        resumed = make_stream(store, n_tokens=420, batch_size=batch_size)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        rest = list(resumed)
        assert len(rest) == len(batches) - done
        assert all(same(one, other) for one, other in zip(rest, batches[done:], strict=True))


def test_resume_runs_the_lm_on_at_most_n_slices_blocks_in_the_same_batches(store):
    stream = make_stream(store, n_tokens=800)
    states = [stream.state_dict() for _ in stream]
    for state in states[:-1]:
        resumed = make_stream(store, n_tokens=800)
        resumed.load_state_dict(state)
        reader = resumed.read
        assert isinstance(reader, Reader)
        next(iter(resumed))
        assert reader.n_rows <= (resumed.n_slices + 1) * resumed.block_rows  # the batch may open one more
        assert reader.n_rows <= resumed.n_slices * resumed.block_rows or state["offset"] > 0
        assert set(reader.calls) == {(3, store.ctx), (1, store.ctx)}, "blocks of 4 rows, as 3 and 1"


def test_a_new_iteration_starts_at_the_beginning(store):
    stream = make_stream(store, n_tokens=200)
    first = list(islice(stream, 9))
    assert stream.state_dict()["batch"] == 9
    again = list(islice(stream, 9))
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    stream.load_state_dict(stream.state_dict())
    assert not same(next(iter(stream)), first[0])
    assert same(next(iter(stream)), first[0])


def test_a_state_of_something_else_is_refused(store, tmp_path):
    state = make_stream(store, n_tokens=200).state_dict()
    make_stream(store, n_tokens=200).load_state_dict(state)
    with pytest.raises(DictlearnError, match="batch size, n_tokens, kind of stream"):
        make_stream(store, n_tokens=900).load_state_dict(state)
    for change in ("seed", "batch_size", "block_rows", "n_slices", "lm_batch_rows"):
        with pytest.raises(DictlearnError, match="A stream continues with the text, tokenizer, seed"):
            make_stream(store, n_tokens=200, **{change: 5}).load_state_dict(state)
    other = unique_store(tmp_path / "other", n_rows=50, ctx=8)
    with pytest.raises(DictlearnError, match="A stream continues with"):
        make_stream(other, n_tokens=200).load_state_dict(state)


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_a_short_text_comes_again(tmp_path, n_rows, caplog):
    caplog.set_level("WARNING")
    store = unique_store(tmp_path / "store", n_rows=n_rows, ctx=8)
    stream = make_stream(store, n_tokens=500)
    seen = Counter(t for batch in stream for t in batch.tokens.tolist())
    assert len(seen) == n_rows * 7
    assert "has ended" in caplog.text
    blocks = -(-504 // (n_rows * 7)) + 3 * 4  # epochs used, and at most those of 3 blocks that are not used up
    assert max(seen.values()) - min(seen.values()) <= blocks


def test_text_without_a_counted_token_is_refused(tmp_path):
    store = unique_store(tmp_path / "store", n_rows=9, ctx=8, masked=lambda _: True)
    with pytest.raises(DictlearnError, match="has 9 rows and no counted token"):
        next(iter(make_stream(store, n_tokens=10)))


def test_batches_keep_the_dtype_of_the_lm(store):
    def read(tokens):
        with torch.inference_mode():
            return {"x": torch.ones(*tokens.shape, 5, dtype=torch.bfloat16)}

    stream = ActivationStream(read, store, batch_size=6, n_tokens=12, block_rows=4, n_slices=2)
    acts = next(iter(stream)).acts["x"]
    assert acts.dtype == torch.bfloat16
    weight = torch.ones(5, 1, dtype=torch.bfloat16, requires_grad=True)
    (acts @ weight).sum().backward()  # an inference tensor could not be saved for this
    assert weight.grad is not None

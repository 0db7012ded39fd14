import numpy as np
import pytest

from dictlearn.data.schedule import group_order, permutation, row_order, slices


def test_permutations_depend_on_all_of_their_counters():
    orders = [permutation(s, p, i, 50) for s in (0, 1, -1) for p in ("epoch", "block", "group") for i in (0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert np.array_equal(permutation(1, "group", 7, 50), permutation(1, "group", 7, 50))


def test_permutations_are_uniform():
    counts = np.zeros((5, 5))
    for i in range(5000):
        counts[np.arange(5), permutation(0, "block", i, 5)] += 1
    assert np.abs(counts - 1000).max() < 5 * (5000 * 0.2 * 0.8) ** 0.5


def test_an_order_that_the_same_seed_always_gives():
    """A change of this order breaks the resume of every run that is under way."""
    assert permutation(0, "block", 0, 8).tolist() == [3, 7, 1, 6, 4, 0, 2, 5]


@pytest.mark.parametrize("n_rows", [1, 2, 7, 100])
def test_epochs_hold_every_row_once(n_rows):
    order = row_order(4, 0, 5 * n_rows, n_rows)
    epochs = order.reshape(5, n_rows)
    assert epochs[0].tolist() == list(range(n_rows))
    assert all(sorted(epoch) == list(range(n_rows)) for epoch in epochs.tolist())
    if n_rows > 6:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
    parts = [row_order(4, start, min(start + 3, 5 * n_rows), n_rows) for start in range(0, 5 * n_rows, 3)]
    assert np.array_equal(np.concatenate(parts), order)


def test_slices_divide_the_counted_tokens():
    counted = np.flatnonzero(np.arange(100) % 7)
    cut = slices(0, 3, counted, 4)
    assert sorted(np.concatenate(cut)) == counted.tolist()
    assert {len(part) for part in cut} == {21, 22}
    order = group_order(0, 3, cut)
    assert sorted(order) == counted.tolist()
    assert not np.array_equal(order, np.concatenate(cut))

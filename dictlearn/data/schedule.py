"""The shuffle as a schedule: which activations form which batch, from seeds and counters alone.

Staggered slices. Rows are taken in an order that starts again, permuted anew, when the text ends; `block_rows`
consecutive entries of it are block b. The counted tokens of a block are permuted by (seed, b) and cut into
`n_slices` slices; group g is slice r of block g - r, for r < n_slices, permuted by (seed, g). Batches are cut
from consecutive groups. So every counted token of a row is used once each time the row comes; a batch mixes
n_slices blocks; n_slices * (n_slices + 1) / 2 slices are alive.

The ends: block g is read, as group g opens, only while the blocks before it hold fewer activations (counted, and
kept by a norm filter) than the run needs. So less than one block is read for nothing: the first n_slices - 1 groups
have the blocks that there are, and the last ones the slices that are left. A position is (group, offset), and how
much has been read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

VERSION = 2  # of this order, in every stream's fingerprint: a position of another one means other activations
_PURPOSES = {"epoch": 1, "block": 2, "group": 3}


class Position(NamedTuple):
    """The next activation to be used is number `offset` of group `group`; `batch` batches came before it.

    `n_ready` activations (counted and kept) are those of the `n_blocks` blocks that have been read.
    """

    group: int = 0
    offset: int = 0
    batch: int = 0
    n_blocks: int = 0
    n_ready: int = 0


def permutation(seed: int, purpose: Literal["epoch", "block", "group"], index: int, n: int) -> np.ndarray:
    """0..n-1 permuted, [n] int64; depends on the arguments alone (counter-based generator)."""
    key = np.array([seed % 2**64, _PURPOSES[purpose] << 56 | index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """Rows in the order of one epoch, [n_rows]: as they are in the first, 0, else permuted by (seed, epoch)."""
    return np.arange(n_rows) if epoch == 0 else permutation(seed, "epoch", epoch, n_rows)


def row_order(seed: int, start: int, stop: int, n_rows: int) -> np.ndarray:
    """Entries `start` to `stop` of the epochs of a text of `n_rows` rows, one after the other, [stop - start]."""
    entries = np.arange(start, stop)
    epochs = entries // n_rows
    parts = [
        epoch_order(seed, int(epoch), n_rows)[entries[epochs == epoch] % n_rows] for epoch in np.unique(epochs)
    ]
    return np.concatenate(parts)


def slices(seed: int, block: int, counted: np.ndarray, n_slices: int) -> list[np.ndarray]:
    """The counted tokens of a block, permuted and cut; sizes differ by at most 1."""
    return np.array_split(counted[permutation(seed, "block", block, len(counted))], n_slices)


def group_order(seed: int, group: int, slots: list[np.ndarray]) -> np.ndarray:
    """The pool entries of a group's slices, slice 0 first, in the order in which they are used."""
    entries = np.concatenate(slots)
    return entries[permutation(seed, "group", group, len(entries))]

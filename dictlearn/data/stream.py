"""Shuffled batches of activations, from one pass of a frozen language model for all sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.data import schedule
from dictlearn.data.base import Read, Stream
from dictlearn.data.pool import Pool
from dictlearn.data.rows import RowStore
from dictlearn.data.schedule import Position


class Batch(NamedTuple):
    """One activation per entry: of token id `tokens[i]`, at position `positions[i]` of row `rows[i]`."""

    acts: dict[str, Float[Tensor, "batch d"]]  # site name -> activations in the LM's dtype
    tokens: Int[Tensor, " batch"]
    rows: Int[Tensor, " batch"]
    positions: Int[Tensor, " batch"]


class ActivationStream(Stream[Batch]):
    """Batches of exactly `batch_size` activations; see schedule.py for the order.

    The LM runs on the blocks that hold `len(self) * batch_size` activations and on no other. To continue, it runs
    again on at most `n_slices` blocks. With a norm filter an offset counts the kept activations of its group; that
    costs one wait for the device per group, without one there is none.
    """

    def __init__(
        self, read: Read, store: RowStore, *, block_rows: int = 256, n_slices: int = 8, **options: Any
    ) -> None:
        super().__init__(read, store, **options)
        self.block_rows, self.n_slices = block_rows, n_slices
        self._pool: Pool | None = None
        self._opened: tuple[int, Pool, Tensor] | None = None
        self._n_blocks = self._n_ready = 0

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size

    def prefetch(self) -> None:
        self.store.prefetch(len(self) * self.batch_size + self.block_rows * self.store.ctx)

    def _sizes(self) -> tuple[Any, ...]:
        return self.block_rows, self.n_slices

    def _n_epochs(self) -> float:
        filtered = (self._n_counted + 1) / (self._n_kept + 1)  # from what has been read so far
        return len(self) * self.batch_size / self.store.n_counted * filtered

    def _batches(self, start: Position) -> Iterator[Batch]:
        self._opened = None
        if self._pool is not None:
            self._pool.clear()
        group, offset, n_batches, self._n_blocks, self._n_ready = start
        for block in range(max(0, group - self.n_slices + 1), self._n_blocks):
            self._fill(block, first_slice=group - block, first_use=False)
        while n_batches < len(self):
            parts: list[tuple[dict[str, Tensor], Tensor]] = []  # one, or several where a group ends
            missing = self.batch_size
            while missing:
                pool, order = self._open(group)
                places = order[offset : offset + missing]
                parts.append(pool.take(places))
                missing -= len(places)
                offset += len(places)
                if offset == len(order):
                    pool.free(group)
                    group, offset = group + 1, 0
            n_batches += 1
            self._position = Position(group, offset, n_batches, self._n_blocks, self._n_ready)
            yield _batch(parts)

    def _open(self, group: int) -> tuple[Pool, Tensor]:
        """The pool, with the group's newest block in it if there is one, and the group's places in their order."""
        if self._opened is None or self._opened[0] != group:
            if group == self._n_blocks and self._n_ready < len(self) * self.batch_size:
                self._n_ready += self._fill(group, first_slice=0, first_use=True).n_kept(group)
                self._n_blocks += 1
            pool = self._pool
            assert pool is not None
            order = pool.order(self.seed, group)
            self._count(pool.n_alive(group), len(order))
            self._opened = group, pool, order
        return self._opened[1:]

    def _fill(self, block: int, first_slice: int, *, first_use: bool) -> Pool:
        """Run the LM on a block and keep its slices from `first_slice` on."""
        rows = self._rows(block * self.block_rows, (block + 1) * self.block_rows, first_use=first_use)
        tokens = self.store.take(rows)  # [block_rows, ctx]
        counted = np.flatnonzero(self.store.mask(tokens).numpy())
        cut = schedule.slices(self.seed, block, counted, self.n_slices)
        batches = tokens.split(self.lm_batch_rows)
        acts = self.read(batches[0])
        if self._pool is None:
            most_per_block = self.block_rows * self.store.most_counted
            self._pool = Pool(acts, self.n_slices, most_per_block, self.norm_filter)
        places = self._pool.place(block, cut, first_slice, tokens, rows)
        parts = places.split(self.lm_batch_rows * self.store.ctx)
        self._pool.put(parts[0], acts)
        for batch, part in zip(batches[1:], parts[1:], strict=True):
            self._pool.put(part, self.read(batch))
        return self._pool


def _batch(parts: list[tuple[dict[str, Tensor], Tensor]]) -> Batch:
    acts = {site: _cat([part[site] for part, _ in parts]) for site in parts[0][0]}
    origin = _cat([part for _, part in parts])  # [batch, 3]
    return Batch(acts, origin[:, 0], origin[:, 1], origin[:, 2])


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

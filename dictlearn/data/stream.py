"""Shuffled batches of activations, from one pass of a frozen language model for all sites."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.data import schedule
from dictlearn.data.pool import Pool
from dictlearn.data.schedule import Position
from dictlearn.data.tokens import TokenStore
from dictlearn.types import DictlearnError, TokenIds

log = logging.getLogger(__name__)
Read = Callable[[TokenIds], Mapping[str, Tensor]]  # token ids -> {site name: [rows, ctx, d]}


class Batch(NamedTuple):
    """One activation per entry: of token id `tokens[i]`, at position `positions[i]` of row `rows[i]`."""

    acts: dict[str, Float[Tensor, "batch d"]]  # site name -> activations in the LM's dtype
    tokens: Int[Tensor, " batch"]
    rows: Int[Tensor, " batch"]
    positions: Int[Tensor, " batch"]


class ActivationStream:
    """`ceil(n_tokens / batch_size)` batches of exactly `batch_size` activations; see schedule.py for the order.

    `read` runs the LM on [rows, ctx] token ids. What comes out depends on the store's rows, the seed and the
    sizes alone. `state_dict()` is the position after the last batch that was yielded; the next `iter()` after
    `load_state_dict` continues there, running the LM again on at most `n_slices` blocks.
    """

    def __init__(
        self,
        read: Read,
        store: TokenStore,
        *,
        batch_size: int,
        n_tokens: int,
        seed: int = 0,
        lm_batch_rows: int = 32,
        block_rows: int = 256,
        n_slices: int = 8,
    ) -> None:
        self.read, self.store, self.seed = read, store, seed
        self.batch_size, self.n_tokens = batch_size, n_tokens
        self.lm_batch_rows, self.block_rows, self.n_slices = lm_batch_rows, block_rows, n_slices
        self._pool: Pool | None = None
        self._opened: tuple[int, Pool, Tensor] | None = None
        self._position, self._resume = Position(), Position()
        self._epoch = 0

    def __len__(self) -> int:
        return math.ceil(self.n_tokens / self.batch_size)

    def prefetch(self) -> None:
        """Start tokenising all that this stream will need; does not wait."""
        ahead = schedule.n_blocks_ahead(self.n_slices) * self.block_rows * self.store.ctx
        self.store.prefetch(self.n_tokens + ahead)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, **self._position._asdict(), "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DictlearnError when the state is of another text, seed or schedule."""
        if (state["seed"], state["fingerprint"]) != (self.seed, self._fingerprint()):
            raise DictlearnError(
                "A stream continues with the text, tokenizer, seed, batch size and data.ctx, data.block_rows, "
                "data.n_slices, data.lm_batch_rows that it began with, and at least one of them has changed"
            )
        self._position = self._resume = Position(state["group"], state["offset"], state["batch"])

    def __iter__(self) -> Iterator[Batch]:
        """One iterator at a time: a new one takes over the pool."""
        start, self._resume = self._resume, Position()
        self._position = start
        return self._batches(start)

    def _batches(self, start: Position) -> Iterator[Batch]:
        self.prefetch()
        self._epoch = 0
        self._opened = None
        if self._pool is not None:
            self._pool.clear()
        for block in range(max(0, start.group - self.n_slices + 1), start.group):
            self._fill(block, first_slice=start.group - block)
        group, offset, n_batches = start
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
            self._position = Position(group, offset, n_batches)
            yield _batch(parts)

    def _open(self, group: int) -> tuple[Pool, Tensor]:
        """The pool, with the group's newest block in it, and the places of the group in their order."""
        if self._opened is None or self._opened[0] != group:
            pool = self._fill(group, first_slice=0)
            self._opened = group, pool, pool.order(self.seed, group)
        return self._opened[1:]

    def _fill(self, block: int, first_slice: int) -> Pool:
        """Run the LM on a block and keep its slices from `first_slice` on."""
        rows = self._rows(block)
        tokens = self.store.take(rows)  # [block_rows, ctx]
        counted = np.flatnonzero(self.store.mask(tokens).numpy())
        cut = schedule.slices(self.seed, block, counted, self.n_slices)
        batches = tokens.split(self.lm_batch_rows)
        acts = self.read(batches[0])
        if self._pool is None:
            most_per_block = self.block_rows * (self.store.ctx - 1)  # position 0 never counts
            self._pool = Pool(acts, self.n_slices, most_per_block)
        places = self._pool.place(block, cut, first_slice, tokens, rows)
        parts = places.split(self.lm_batch_rows * self.store.ctx)
        self._pool.put(parts[0], acts)
        for batch, part in zip(batches[1:], parts[1:], strict=True):
            self._pool.put(part, self.read(batch))
        return self._pool

    def _rows(self, block: int) -> np.ndarray:
        """The row indices of a block; waits for the store."""
        start, stop = block * self.block_rows, (block + 1) * self.block_rows
        n_rows = self.store.wait(stop)
        if n_rows == stop:
            return np.arange(start, stop)
        if self.store.n_counted == 0:
            raise DictlearnError(
                f"{self.store.name} must fill at least one row of data.ctx = {self.store.ctx} tokens with text "
                f"that counts, but has {n_rows} rows and no counted token"
            )
        epoch = (stop - 1) // n_rows
        if epoch > self._epoch:
            self._epoch = epoch
            counts = f"{n_rows} rows, {self.store.n_counted} counted tokens"
            log.warning("%s has ended (%s): epoch %d, in a new row order", self.store.name, counts, epoch)
        return schedule.row_order(self.seed, start, stop, n_rows)

    def _fingerprint(self) -> str:
        parts = (self.store.fingerprint, self.batch_size, self.lm_batch_rows, self.block_rows, self.n_slices)
        return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _batch(parts: list[tuple[dict[str, Tensor], Tensor]]) -> Batch:
    acts = {site: _cat([part[site] for part, _ in parts]) for site in parts[0][0]}
    origin = _cat([part for _, part in parts])  # [batch, 3]
    return Batch(acts, origin[:, 0], origin[:, 1], origin[:, 2])


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

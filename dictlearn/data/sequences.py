"""Whole contexts: the activations of rows of text in their order, for what needs neighbouring tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dictlearn.data.base import Stream, to_device
from dictlearn.data.schedule import Position
from dictlearn.data.stream import Batch


class Sequences(NamedTuple):
    """Rows of text: activation [i, p] is of token id `tokens[i, p]` of row `rows[i]`; `mask` says which count.

    `counted` are the places i * ctx + p where the mask is true, in their order.
    """

    acts: dict[str, Float[Tensor, "rows ctx d"]]  # site name -> activations in the LM's dtype
    tokens: Int[Tensor, "rows ctx"]
    rows: Int[Tensor, " rows"]
    mask: Bool[Tensor, "rows ctx"]
    counted: Int[Tensor, " n_counted"]

    def flat(self) -> Batch:
        """The counted activations, one per entry; does not wait for the device."""
        ctx = self.tokens.shape[1]
        acts = {site: value.flatten(0, 1).index_select(0, self.counted) for site, value in self.acts.items()}
        row = self.counted // ctx
        return Batch(acts, self.tokens.flatten()[self.counted], self.rows[row], self.counted % ctx)


class SequenceStream(Stream[Sequences]):
    """Batches of max(1, batch_size // ctx) whole rows, in the row order of the schedule: nothing is shuffled.

    `n_tokens` counts ctx - 1 activations a row: all but position 0, which is BOS or is not counted. Rows with
    special tokens inside, and a norm filter, give fewer. Rows of which nothing counts are passed over. A position
    is the number of groups of rows before it, so continuing is immediate. With a norm filter each batch costs one
    synchronisation, without one none.
    """

    @property
    def n_rows(self) -> int:
        """Rows per batch."""
        return max(1, self.batch_size // self.store.ctx)

    @property
    def tokens_per_batch(self) -> int:
        return self.n_rows * (self.store.ctx - 1)

    def prefetch(self) -> None:
        self.store.prefetch(len(self) * self.tokens_per_batch)

    def _sizes(self) -> tuple[Any, ...]:
        return ()

    def _n_epochs(self) -> float:
        return len(self) * self.n_rows / self.store.n_rows

    def _batches(self, start: Position) -> Iterator[Sequences]:
        group, n_batches = start.group, start.batch
        while n_batches < len(self):
            batch = self._sequences(self._rows(group * self.n_rows, (group + 1) * self.n_rows))
            group += 1
            if len(batch.counted) == 0:
                continue
            n_batches += 1
            self._position = Position(group, batch=n_batches)
            yield batch

    @torch.no_grad()
    def _sequences(self, rows: np.ndarray) -> Sequences:
        tokens = self.store.take(rows)  # [rows, ctx]
        mask = self.store.mask(tokens)
        parts = [self.read(part) for part in tokens.split(self.lm_batch_rows)]
        acts = {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
        device = next(iter(acts.values())).device
        n_counted = int(mask.sum())
        if self.norm_filter is not None:
            mask = mask & self.norm_filter.keep(acts).cpu()
        counted = np.flatnonzero(mask.numpy())
        self._count(n_counted, len(counted))
        on_device = [to_device(values, device) for values in (tokens.numpy(), rows, mask.numpy(), counted)]
        return Sequences(acts, *on_device)

"""The memory of the shuffle: activations that wait for their batch, in slots allocated once."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dictlearn.data import schedule
from dictlearn.data.base import to_device
from dictlearn.data.outliers import NormFilter
from dictlearn.types import TokenIds

log = logging.getLogger(__name__)


class Pool:
    """`n_slices * (n_slices + 1) / 2` slots, each for one slice of a block; all sites share the places.

    `acts[site]` is [n_places, d] in the LM's dtype, `origin` is [n_places, 3]: token id, row, position. The last
    place takes the tokens that are not counted. Activations that `norm_filter` does not keep have a place as all
    others, and are left out of the order.
    """

    def __init__(
        self,
        acts: Mapping[str, Tensor],
        n_slices: int,
        most_per_block: int,
        norm_filter: NormFilter | None = None,
    ) -> None:
        self.n_slices, self.slot_size = n_slices, math.ceil(most_per_block / n_slices)
        n_slots = n_slices * (n_slices + 1) // 2
        n_places = n_slots * self.slot_size + 1
        device = next(iter(acts.values())).device
        self.acts = {
            site: torch.empty(n_places, value.shape[-1], dtype=value.dtype, device=device)
            for site, value in acts.items()
        }
        self.origin = torch.empty(n_places, 3, dtype=torch.int64, device=device)
        self.norm_filter = norm_filter
        self.kept = torch.ones(n_places, dtype=torch.bool, device=device)
        self.free_slots = list(range(n_slots))
        self.alive: dict[tuple[int, int], tuple[int, int]] = {}  # (block, slice) -> its slot, its size
        size = sum(value.nbytes for value in self.acts.values())
        log.info("shuffling pool: %d activations per site, %.0f MB", n_places, size / 1e6)

    def clear(self) -> None:
        for block, index in list(self.alive):
            self._free(block, index)

    def place(
        self, block: int, cut: list[np.ndarray], first_slice: int, tokens: TokenIds, rows: np.ndarray
    ) -> Tensor:
        """Reserve slots for the slices `cut` of a block from `first_slice` on: each token's place, [rows * ctx]."""
        places = np.full(tokens.numel(), len(self.origin) - 1)
        for index, members in enumerate(cut[first_slice:], first_slice):
            slot = self.free_slots.pop()
            self.alive[block, index] = slot, len(members)
            places[members] = slot * self.slot_size + np.arange(len(members))
        ctx = tokens.shape[1]
        origin = [tokens.numpy().ravel(), rows.repeat(ctx), np.tile(np.arange(ctx), len(rows))]
        on_device = to_device(places, self.origin.device)
        self.origin.index_copy_(0, on_device, to_device(np.stack(origin, axis=1), self.origin.device))
        return on_device

    @torch.no_grad()
    def put(self, places: Tensor, acts: Mapping[str, Tensor]) -> None:
        """`acts[site]` [rows, ctx, d] of the tokens with these places, [rows * ctx]."""
        for site, pool in self.acts.items():
            pool.index_copy_(0, places, acts[site].flatten(0, 1))
        if self.norm_filter is not None:
            self.kept.index_copy_(0, places, self.norm_filter.keep(acts).flatten())

    def order(self, seed: int, group: int) -> Tensor:
        """The places of a group's activations that are kept, in the order in which they are used, [n]."""
        first_to_last = [slot * self.slot_size + np.arange(size) for slot, size in self._slots(group)]
        order = to_device(schedule.group_order(seed, group, first_to_last), self.origin.device)
        return order if self.norm_filter is None else order[self.kept[order]]

    def n_alive(self, group: int) -> int:
        """Places of a group, kept or not."""
        return sum(size for _, size in self._slots(group))

    def n_kept(self, block: int) -> int:
        """Activations of a whole block that are kept; waits for the device where there is a norm filter."""
        slots = [self.alive[block, index] for index in range(self.n_slices)]
        if self.norm_filter is None:
            return sum(size for _, size in slots)
        starts = [(slot * self.slot_size, size) for slot, size in slots]
        return int(torch.stack([self.kept[start : start + size].sum() for start, size in starts]).sum())

    def take(self, places: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Copies: site -> [n, d], and the origin, [n, 3]."""
        return {site: p.index_select(0, places) for site, p in self.acts.items()}, self.origin[places]

    def free(self, group: int) -> None:
        """Give back the slots of a group."""
        for r in self._slices(group):
            self._free(group - r, r)

    def _slices(self, group: int) -> list[int]:
        """The slices of a group that there are: at the ends of a run some of its blocks are not read."""
        return [r for r in range(self.n_slices) if (group - r, r) in self.alive]

    def _slots(self, group: int) -> list[tuple[int, int]]:
        """(slot, size) of each slice of a group."""
        return [self.alive[group - r, r] for r in self._slices(group)]

    def _free(self, block: int, index: int) -> None:
        slot, _ = self.alive.pop((block, index))
        self.free_slots.append(slot)

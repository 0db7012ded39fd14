"""Batches that come from an activation store, which the first run writes while it trains."""

from __future__ import annotations

import json
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dictlearn.data.manifest import DECIDING, ORIGIN, bytes_per_activation
from dictlearn.data.store import ActivationStore
from dictlearn.data.stream import ActivationStream, Batch
from dictlearn.types import DictlearnError

log = logging.getLogger(__name__)
SHARD_BYTES = 2**28  # two shards are in memory, when writing and when reading


class StoredStream:
    """The batches of `stream`, in the dtype of `store`: from its shards, and from the LM where they end.

    What the LM makes is added to the store, so that the next run reads it. A position is the number of activations
    before it. A run that continues behind the last whole shard computes what lies between once more, to store it.
    Where a complete store ends within the last batch, that batch is shorter.
    """

    def __init__(
        self, stream: ActivationStream, store: ActivationStore, sites: Sequence[str], device: torch.device
    ) -> None:
        self.stream, self.store, self.sites, self.device = stream, store, tuple(sites), device
        self.batch_size = stream.batch_size
        self._offset = self._resume = 0
        self._iterator: Generator[Batch, None, None] | None = None

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size

    def __len__(self) -> int:
        return len(self.stream)

    def state_dict(self) -> dict[str, Any]:
        return {"offset": self._offset, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DictlearnError when the state is of other activations or batches."""
        if state.get("fingerprint") != self._fingerprint():
            raise DictlearnError(
                f"A run continues with the activations and the batch size that it began with, and those of "
                f"{self.store.folder} are others: was the store written again?"
            )
        self._offset = self._resume = state["offset"]

    def __iter__(self) -> Iterator[Batch]:
        """One iterator at a time: a new one ends the one before."""
        self._end_iterator()
        start, self._resume = self._resume, 0
        self._offset = start
        self._iterator = self._batches(start)
        return self._iterator

    def close(self) -> None:
        """Finish what is being written, and let other runs use the store."""
        self._end_iterator()
        self.store.close()

    def _end_iterator(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _batches(self, start: int) -> Generator[Batch, None, None]:
        end = min(len(self) * self.batch_size, self.store.n_tokens)
        yield from self._read(start, min(self.store.n_stored, end))
        if self.store.n_stored < end:
            yield from self._write(start)

    def _read(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches from activation `start` to `stop`, which are in the store."""
        ends = list(accumulate(shard.n for shard in self.store.shards))
        numbers = range(bisect_right(ends, start), bisect_left(ends, stop) + 1) if start < stop else range(0)
        offset, parts = start, []
        missing = min(self.batch_size, stop - offset)
        for number, shard in zip(numbers, self._shards(numbers), strict=True):
            while offset < min(ends[number], stop):
                n = min(missing, ends[number] - offset)
                begin = offset - ends[number] + self.store.shards[number].n
                parts.append({name: values[begin : begin + n] for name, values in shard.items()})
                offset, missing = offset + n, missing - n
                if missing == 0:
                    self._offset, batch = offset, self._batch(parts)
                    parts, missing = [], min(self.batch_size, stop - offset)
                    yield batch

    def _shards(self, numbers: range) -> Iterator[dict[str, Tensor]]:
        """Each shard while the next one is read, and compared with its hashes, in a thread."""

        def load(number: int) -> dict[str, Tensor]:
            tensors = self.store.load(number, self.sites)
            pinned = self.device.type == "cuda"
            return {name: value.pin_memory() for name, value in tensors.items()} if pinned else tensors

        with ThreadPoolExecutor(1) as thread:
            ahead: list[Future[dict[str, Tensor]]] = [thread.submit(load, number) for number in numbers[:1]]
            for number in numbers:
                shard = ahead.pop().result()
                if number + 1 in numbers:
                    ahead.append(thread.submit(load, number + 1))
                yield shard

    def _batch(self, parts: list[dict[str, Tensor]]) -> Batch:
        """Copies, so that memory is aligned as in the run that wrote them; does not wait for the device."""
        columns = {
            name: torch.cat([part[name].to(self.device, non_blocking=True) for part in parts]) for name in parts[0]
        }
        tokens, rows, positions = (columns.pop(name).long() for name in ORIGIN)
        return Batch(columns, tokens, rows, positions)

    def _write(self, start: int) -> Iterator[Batch]:
        """The batches from where the store ends, which go into it; those from activation `start` on are yielded."""
        n, store = self.store.n_stored, self.store
        if n < start:
            log.info("%d activations before the checkpoint are computed again, for %s", start - n, store.folder)
        if store.shards:
            self.stream.load_state_dict(store.shards[-1].position)
        batches = iter(self.stream)
        writer = _Writer(store, self.batch_size)
        try:
            for batch in batches:
                n += self.batch_size
                if writer.add(batch) or n == store.n_tokens:
                    writer.submit(self.stream.state_dict())
                if n == store.n_tokens:
                    writer.wait()  # before the last batch: nobody may ask for a next one
                if n > start:
                    self._offset = n
                    yield batch
        finally:
            writer.close()

    def _fingerprint(self) -> str:
        contents = self.store.contents
        order = {key: contents[key] for key in (*DECIDING, "schedule")}
        parts = [order, contents["sites"], self.store.n_tokens, self.batch_size]
        return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class _Writer:
    """Gathers batches into shards; a thread writes one while the next is gathered, in the other of two buffers."""

    def __init__(self, store: ActivationStore, batch_size: int) -> None:
        self.store = store
        sites, dtype = store.contents["sites"], store.contents["dtype"]
        per_activation = bytes_per_activation(sum(sites.values()), dtype)
        n_left = store.n_tokens - store.n_stored
        self.n_per_shard = min(max(1, SHARD_BYTES // (per_activation * batch_size)) * batch_size, n_left)
        self.buffers: list[dict[str, Tensor]] = []
        self.on_cuda = False  # the batches
        self.n = 0
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def add(self, batch: Batch) -> bool:
        """Copy a batch, without waiting for its device; True when the shard is full and has to be submitted."""
        if not self.buffers:
            self.buffers = [self._buffer(batch) for _ in range(2)]
            self.on_cuda = batch.tokens.is_cuda
        stop = self.n + len(batch.tokens)
        for name, values in _columns(batch).items():
            self.buffers[0][name][self.n : stop].copy_(values, non_blocking=True)
        self.n = stop
        return stop == self.n_per_shard

    def submit(self, position: dict[str, Any]) -> None:
        """Write what was added, once what was submitted before is written."""
        self.wait()
        copied = torch.cuda.Event() if self.on_cuda else None
        if copied is not None:
            copied.record()
        tensors = {name: values[: self.n] for name, values in self.buffers[0].items()}
        self.pending = self.thread.submit(self._append, tensors, position, copied)
        self.buffers.reverse()
        self.n = 0

    def wait(self) -> None:
        """Until all that was submitted is on disk; raises what the thread raised."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        self.thread.shutdown()

    def _append(self, tensors: dict[str, Tensor], position: dict[str, Any], copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        self.store.append(tensors, position)

    def _buffer(self, batch: Batch) -> dict[str, Tensor]:
        pinned = batch.tokens.is_cuda
        dtypes = {name: getattr(torch, dtype) for name, dtype in ORIGIN.items()}
        acts = getattr(torch, self.store.contents["dtype"])
        return {
            name: torch.empty(self.n_per_shard, *values.shape[1:], dtype=dtypes.get(name, acts), pin_memory=pinned)
            for name, values in _columns(batch).items()
        }


def _columns(batch: Batch) -> dict[str, Tensor]:
    return {**batch.acts, "tokens": batch.tokens, "rows": batch.rows, "positions": batch.positions}

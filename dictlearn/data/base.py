"""What the two streams share: rows in the order of the schedule, a length, and a position that can be saved."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dictlearn.data import schedule
from dictlearn.data.outliers import NormFilter
from dictlearn.data.rows import RowStore
from dictlearn.data.schedule import Position
from dictlearn.types import DictlearnError, TokenIds

log = logging.getLogger(__name__)
T = TypeVar("T")
Read = Callable[[TokenIds], Mapping[str, Tensor]]  # token ids -> {site name: [rows, ctx, d]}
MOST_EMPTY = 16  # groups in a row of which the norm filter leaves nothing


class Stream(ABC, Generic[T]):
    """`ceil(n_tokens / tokens_per_batch)` batches of activations.

    `read` runs the LM on [rows, ctx] token ids. What comes out depends on the store's rows, the seed and the
    sizes alone. `state_dict()` is the position after the last batch that was yielded; the next `iter()` after
    `load_state_dict` continues there. Activations that `norm_filter` does not keep are left out.
    """

    def __init__(
        self,
        read: Read,
        store: RowStore,
        *,
        batch_size: int,
        n_tokens: int,
        seed: int = 0,
        lm_batch_rows: int = 32,
        norm_filter: NormFilter | None = None,
    ) -> None:
        self.read, self.store, self.seed = read, store, seed
        self.batch_size, self.n_tokens, self.lm_batch_rows = batch_size, n_tokens, lm_batch_rows
        self.norm_filter = norm_filter
        self._position, self._resume = Position(), Position()
        self._n_empty = self._n_counted = self._n_kept = 0

    @property
    @abstractmethod
    def tokens_per_batch(self) -> int:
        """Activations trained on per batch, as `n_tokens` counts them."""

    @abstractmethod
    def prefetch(self) -> None:
        """Start tokenising all that this stream will need; does not wait."""

    @abstractmethod
    def _batches(self, start: Position) -> Iterator[T]:
        """The batches from a position on; sets `_position` before each one."""

    @abstractmethod
    def _sizes(self) -> tuple[Any, ...]:
        """What beside the text, the seed and the norm filter decides the batches."""

    @abstractmethod
    def _n_epochs(self) -> float:
        """Passes over the text that the stream takes, once the text has ended."""

    def __len__(self) -> int:
        return math.ceil(self.n_tokens / self.tokens_per_batch)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, **self._position._asdict(), "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DictlearnError when the state is of another text, seed or schedule."""
        if (state["seed"], state["fingerprint"]) != (self.seed, self._fingerprint()):
            raise DictlearnError(
                "A stream continues with the text, tokenizer, seed, batch size, n_tokens, kind of stream and "
                "data.ctx, data.block_rows, data.n_slices, data.lm_batch_rows, data.max_norm_ratio that it began "
                "with, in the same order of activations, and at least one of them has changed"
            )
        self._position = self._resume = Position(*(state[field] for field in Position._fields))

    def __iter__(self) -> Iterator[T]:
        """One iterator at a time: a new one takes over."""
        start, self._resume = self._resume, Position()
        self._position = start
        self._n_empty = self._n_counted = self._n_kept = 0
        self.prefetch()
        return self._batches(start)

    def _rows(self, start: int, stop: int, *, first_use: bool = True) -> np.ndarray:
        """Entries `start` to `stop` of the row order; waits for the store.

        On their `first_use`, says when they begin another pass over the text; not of rows of the last block that
        are beyond the passes that the stream takes.
        """
        n_rows = self.store.wait(stop)
        if n_rows == stop:
            return np.arange(start, stop)
        if self.store.n_counted == 0:
            raise DictlearnError(
                f"{self.store.name} must fill at least one row of data.ctx = {self.store.ctx} tokens with text "
                f"that counts, but has {n_rows} rows and no counted token"
            )
        n_epochs = self._n_epochs()
        before = 1 + max(start - 1, 0) // n_rows  # epochs count from 1 for users
        epoch = min(1 + (stop - 1) // n_rows, math.ceil(n_epochs))
        if first_use and epoch > before:
            counts = f"{n_rows} rows, {self.store.n_counted} counted tokens"
            message = "%s has ended (%s): epoch %d begins, in a new row order; the run takes %.2f epochs"
            log.warning(message, self.store.name, counts, epoch, n_epochs)
        return schedule.row_order(self.seed, start, stop, n_rows)

    def _count(self, n_counted: int, n_kept: int) -> None:
        """Of each group. Raises DictlearnError when the filter has left nothing of MOST_EMPTY groups in a row."""
        self._n_counted += n_counted
        self._n_kept += n_kept
        self._n_empty = self._n_empty + 1 if n_counted and not n_kept else 0
        if self._n_empty == MOST_EMPTY and self.norm_filter is not None:
            raise DictlearnError(
                f"data.max_norm_ratio = {self.norm_filter.ratio} must leave activations to train on, but in "
                f"{MOST_EMPTY} groups in a row each token's norm is above the limit at one of the sites, or not "
                f"finite ({self.norm_filter.describe()})"
            )

    def _fingerprint(self) -> str:
        ratio = None if self.norm_filter is None else float(self.norm_filter.ratio)
        own = (self.store.fingerprint, self.batch_size, len(self), self.lm_batch_rows, ratio)
        parts = (type(self).__name__, schedule.VERSION, *own)
        return blake2b(repr(parts + self._sizes()).encode(), digest_size=16).hexdigest()


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy that does not wait for the device."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

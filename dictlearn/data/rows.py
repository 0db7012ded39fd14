"""What activations are computed from: rows of token ids, and the settings of a run that goes through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dictlearn.lm.load import LM
from dictlearn.types import TokenIds, TokenMask

PLACES = ("cache_dir", "store", "store_dtype")  # where a machine keeps things


class Rows(NamedTuple):
    """Held-out rows: token ids, which of them count, and `info` for the report."""

    tokens: TokenIds
    mask: TokenMask
    info: dict[str, Any]


class RowStore(ABC):
    """Rows of `ctx` token ids, addressed by index. `name` says in messages what they are."""

    ctx: int
    name: str

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal rows."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Rows that are there now."""

    @property
    @abstractmethod
    def n_counted(self) -> int:
        """Tokens of the rows that are there now that are not masked."""

    @property
    def most_counted(self) -> int:
        """The most tokens of one row that count: position 0 is BOS, or is not counted."""
        return self.ctx - 1

    @abstractmethod
    def prefetch(self, n_counted: int) -> None:
        """Start to prepare `n_counted` counted tokens; does not wait."""

    @abstractmethod
    def wait(self, n_rows: int) -> int:
        """The smaller of `n_rows` and all rows there are, once they are there."""

    @abstractmethod
    def wait_counted(self, n_counted: int) -> int:
        """The number of first rows that hold `n_counted` counted tokens, or all rows where there are fewer."""

    @abstractmethod
    def take(self, indices: np.ndarray) -> TokenIds:
        """The rows of these indices, int64, in their order; waits for them."""

    @abstractmethod
    def mask(self, rows: TokenIds) -> TokenMask:
        """True where a token is counted."""

    def rows(self, start: int, stop: int) -> TokenIds:
        """Rows `start` to `stop` (exclusive), int64; waits for them. IndexError beyond the last."""
        return self.take(np.arange(start, stop))


@dataclass
class RowData(ABC):
    """Rows of `ctx` tokens for a model, and how activations of them are shuffled: what conf/data/*.yaml builds.

    The shuffle (schedule.py): blocks of `block_rows` rows are cut into `n_slices` slices; about
    block_rows * ctx * (n_slices + 1) / 2 activations per site are in memory. The LM runs `lm_batch_rows` at once.

    `max_norm_ratio`: tokens whose activation norm is above this many times the site's median norm, at any site,
    are not trained on; None keeps all.

    `store`: a folder for the activations, written by the first run and read by later ones (store.py), as
    `store_dtype`; None runs the LM in every run.
    """

    ctx: int = 128
    lm_batch_rows: int = 32
    block_rows: int = 256
    n_slices: int = 8
    max_norm_ratio: float | None = None
    store: str | None = None
    store_dtype: str = "bfloat16"

    is_text: ClassVar[bool] = True  # for any language model, kept on disk, in an order that means something

    @property
    @abstractmethod
    def title(self) -> str:
        """What the rows are, for messages and reports."""

    @abstractmethod
    def problems(self, n_positions: int | None = None) -> list[str]:
        """What is wrong with this configuration, one sentence each; `n_positions` is the LM's longest context."""

    @abstractmethod
    def train(self, tokenizer: PreTrainedTokenizerBase) -> RowStore:
        """The rows to train on."""

    @abstractmethod
    def heldout(self, tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> Rows:
        """The first held-out rows with at least `n_tokens` counted tokens, or all (with a warning) if fewer."""

    def own_lm(self, device: str = "cpu") -> LM | None:  # noqa: ARG002
        """Where the rows are no text, the only model that can read them."""
        return None

    def own_skeleton(self) -> PreTrainedModel | None:
        """The modules of `own_lm`, on the meta device. Raises DictlearnError for sizes that are none."""
        return None

    def record(self) -> dict[str, Any]:
        """What names these rows wherever they are, JSON-able: the class and its arguments, without places."""
        named = [field.name for field in fields(self) if field.init and field.name not in PLACES]
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in named}}

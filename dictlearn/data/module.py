"""What training uses: text, a frozen LM and sites as one LightningDataModule."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from dictlearn.choices import STREAMS
from dictlearn.data import schedule
from dictlearn.data.base import Stream
from dictlearn.data.manifest import STORE_DTYPES
from dictlearn.data.normalize import SiteStatistics, estimate_norm_filter, estimate_statistics
from dictlearn.data.outliers import NormFilter
from dictlearn.data.packing import TOKENIZER_FILE
from dictlearn.data.rows import RowData, Rows, RowStore
from dictlearn.data.sequences import SequenceStream
from dictlearn.data.store import ActivationStore
from dictlearn.data.stored import StoredStream
from dictlearn.data.stream import ActivationStream
from dictlearn.data.text import warn_of_unknown
from dictlearn.data.tokens import TokenStore
from dictlearn.lm.load import LM
from dictlearn.lm.taps import activations, widths
from dictlearn.types import DictlearnError, Site, TokenIds

log = logging.getLogger(__name__)


class ActivationData(LightningDataModule):
    """Activations of `lm` at `sites`: `n_tokens` of them, in batches of about `batch_size`.

    `stream` is "shuffled" (batches of single activations, stream.py) or "sequences" (of whole rows, sequences.py).
    The order depends on `seed`, the text and its configuration alone. Lightning keeps the stream's position in
    its checkpoints; use max_steps with max_epochs=-1. The LM is in no module tree, so it is in no checkpoint.

    Activations that are not finite are an error in `statistics`, are left out where text.max_norm_ratio is set, and
    otherwise, should they come later in the text, reach the training: its loss then is not finite, which ends it.

    With text.store, the shuffled activations are rounded to text.store_dtype; the first run writes them there, and
    later ones read them, and the statistics, instead of running the LM.
    """

    def __init__(
        self,
        text: RowData,
        lm: LM,
        sites: Sequence[Site],
        batch_size: int,
        n_tokens: int,
        seed: int = 0,
        stream: str = "shuffled",
    ) -> None:
        super().__init__()
        if stream not in STREAMS:
            raise DictlearnError(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
        if problem := store_setting_problem(text, stream):
            raise DictlearnError(problem)
        self.text, self.lm, self.sites = text, lm, tuple(sites)
        self.batch_size, self.n_tokens, self.seed, self.stream = batch_size, n_tokens, seed, stream

    @cached_property
    def store(self) -> RowStore:
        """The rows that are trained on; tokenising starts when this is first used, if the LM has to run."""
        store = self.text.train(self.lm.tokenizer)
        if self.text.store is None:
            self._stream(store, None).prefetch()
        return store

    @cached_property
    def activation_store(self) -> ActivationStore | None:
        """The store of text.store: complete, or locked for this run to write. Raises DictlearnError if neither."""
        if self.text.store is None:
            return None
        store = ActivationStore(store_folder(self.text.store), self._asked())
        if not store.complete:
            self._stream(self.store, None).prefetch()
        own, stored = [site.name for site in self.sites], list(store.contents["sites"])
        if self.text.max_norm_ratio is not None and len(own) < len(stored):
            log.warning(
                "data.max_norm_ratio left out of data.store=%s what has a large norm at any of its sites (%s); "
                "a run of %s alone without data.store trains on some of them",
                self.text.store,
                ", ".join(stored),
                ", ".join(own),
            )
        return store

    @cached_property
    def norm_filter(self) -> NormFilter | None:
        """The limits of text.max_norm_ratio: a function of the LM, the sites and the text; runs the LM once."""
        ratio = self.text.max_norm_ratio
        if ratio is None:
            return None
        if kept := self._kept_statistics():
            return NormFilter(ratio, kept[1])
        return estimate_norm_filter(self.read, self.store, ratio, self.text.lm_batch_rows)

    def train_dataloader(self) -> Stream | StoredStream:
        return self._stream(self.store, self.norm_filter) if self._stored is None else self._stored

    @cached_property
    def _stored(self) -> StoredStream | None:
        if self.activation_store is None:
            return None
        if self._kept_statistics() is None:
            self.statistics()  # for the runs that will read
        stream = self._stream(self.store, self.norm_filter)
        assert isinstance(stream, ActivationStream)
        return StoredStream(stream, self.activation_store, [site.name for site in self.sites], self.lm.device)

    def close(self) -> None:
        """Finish what is being written to the activation store, if there is one, and let other runs use it."""
        if self.text.store is None or "activation_store" not in self.__dict__:
            return
        if "_stored" in self.__dict__ and self._stored is not None:
            self._stored.close()
        elif self.activation_store is not None:
            self.activation_store.close()

    def statistics(self, n_tokens: int = 65_536, covariances: Collection[str] = ()) -> dict[str, SiteStatistics]:
        """Site name -> statistics over the first rows of the text; the stream does not move.

        With the covariances of the sites named in `covariances`; an activation store has those of all sites.
        Warns where many of these tokens are unknown to the tokenizer. From an activation store, those of the run
        that wrote it, which asked for as many tokens; else raises DictlearnError.
        """
        if kept := self._kept_statistics():
            if kept[2] != n_tokens:
                raise DictlearnError(
                    f"data.store={self.text.store} has the statistics of statistics_n_tokens = {kept[2]}, not of "
                    f"{n_tokens}"
                )
            return {site.name: kept[0][site.name] for site in self.sites}
        tokens = self.store.rows(0, self.store.wait_counted(n_tokens))
        warn_of_unknown(self.lm.tokenizer, self.store.name, tokens, self.store.mask(tokens))
        if self.activation_store is not None:
            covariances = [site.name for site in self.sites]  # whatever later runs need
        found = estimate_statistics(
            self.read, self.store, n_tokens, self.text.lm_batch_rows, self.norm_filter, covariances
        )
        if self.activation_store is not None:
            self.activation_store.keep(found, self.norm_filter.limits if self.norm_filter else {}, n_tokens)
        return found

    def heldout(self, n_tokens: int) -> Rows:
        return self.text.heldout(self.lm.tokenizer, n_tokens)

    def read(self, tokens: TokenIds) -> Mapping[str, Tensor]:
        """One LM pass: token ids [rows, ctx] on the CPU -> {site name: [rows, ctx, d]} on the LM's device."""
        device = self.lm.device
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        acts = activations(self.lm.model, self.sites, tokens.to(device, non_blocking=True))
        if self.text.store is None:
            return acts
        dtype = getattr(torch, self.text.store_dtype)
        return {site: values.to(dtype) for site, values in acts.items()}

    def _kept_statistics(self) -> tuple[dict[str, SiteStatistics], dict[str, float], int] | None:
        return None if self.activation_store is None else self.activation_store.statistics()

    def _asked(self) -> dict[str, Any]:
        """What the activation store has to hold."""
        assert isinstance(self.store, TokenStore)  # other rows are not stored
        tokenizer = (self.store.folder / TOKENIZER_FILE).read_bytes()
        return {
            **asked_of_text(self.text),
            "lm": self.lm.fingerprint(),
            "lm_name": self.lm.name,
            "lm_revision": self.lm.revision,
            "lm_dtype": self.lm.dtype,
            "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
            "text": self.store.fingerprint,
            "seed": self.seed,
            "n_tokens": self.n_tokens,
            "batch_size": self.batch_size,
            "sites": widths(self.lm.model, self.sites),
        }

    def _stream(self, store: RowStore, norm_filter: NormFilter | None) -> Stream:
        common = {
            "batch_size": self.batch_size,
            "n_tokens": self.n_tokens,
            "seed": self.seed,
            "lm_batch_rows": self.text.lm_batch_rows,
            "norm_filter": norm_filter,
        }
        if self.stream == "sequences":
            return SequenceStream(self.read, store, **common)
        return ActivationStream(
            self.read, store, block_rows=self.text.block_rows, n_slices=self.text.n_slices, **common
        )


def store_folder(place: str) -> Path:
    """The folder of data.store. Raises DictlearnError for that of a user who does not exist."""
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise DictlearnError(f"data.store must be a folder, got {place}: {error}") from error


def store_setting_problem(text: RowData, stream: str) -> str | None:
    """What is wrong with data.store, data.store_dtype and the stream as such, one sentence."""
    if not text.is_text and stream != "shuffled":
        return f"stream={stream} is for text; {text.title} are draws that do not follow each other: use shuffled"
    if text.store is not None and not (isinstance(text.store, str) and text.store):
        return f"data.store must be null or a folder, got {text.store!r}"
    if text.store_dtype not in STORE_DTYPES:
        return f"data.store_dtype must be one of {', '.join(STORE_DTYPES)}, got {text.store_dtype!r}"
    if text.store is not None and stream != "shuffled":
        return f"data.store holds shuffled activations: use stream=shuffled or data.store=null, got stream={stream}"
    return None


def asked_of_text(text: RowData) -> dict[str, Any]:
    """What a configuration of text alone asks of an activation store."""
    same = ("ctx", "block_rows", "n_slices", "lm_batch_rows", "max_norm_ratio")
    return {**{key: getattr(text, key) for key in same}, "dtype": text.store_dtype, "schedule": schedule.VERSION}

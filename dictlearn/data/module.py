"""What training uses: text, a frozen LM and sites as one LightningDataModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from lightning import LightningDataModule
from torch import Tensor

from dictlearn.config import STREAMS
from dictlearn.data.base import Stream
from dictlearn.data.normalize import SiteStatistics, estimate_norm_filter, estimate_statistics
from dictlearn.data.outliers import NormFilter
from dictlearn.data.sequences import SequenceStream
from dictlearn.data.stream import ActivationStream
from dictlearn.data.text import Rows, TextData, warn_of_unknown
from dictlearn.data.tokens import TokenStore
from dictlearn.lm.load import LM
from dictlearn.lm.taps import activations
from dictlearn.types import DictlearnError, Site, TokenIds


class ActivationData(LightningDataModule):
    """Activations of `lm` at `sites`: `n_tokens` of them, in batches of about `batch_size`.

    `stream` is "shuffled" (batches of single activations, stream.py) or "sequences" (of whole rows, sequences.py).
    The order depends on `seed`, the text and its configuration alone. Lightning keeps the stream's position in
    its checkpoints; use max_steps with max_epochs=-1. The LM is in no module tree, so it is in no checkpoint.

    Activations that are not finite are an error in `statistics`, are left out where text.max_norm_ratio is set, and
    otherwise, should they come later in the text, reach the training: its loss then is not finite, which ends it.
    """

    def __init__(
        self,
        text: TextData,
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
        self.text, self.lm, self.sites = text, lm, tuple(sites)
        self.batch_size, self.n_tokens, self.seed, self.stream = batch_size, n_tokens, seed, stream

    @cached_property
    def store(self) -> TokenStore:
        """The rows that are trained on; tokenising starts when this is first used."""
        store = self.text.train(self.lm.tokenizer)
        self._stream(store, None).prefetch()
        return store

    @cached_property
    def norm_filter(self) -> NormFilter | None:
        """The limits of text.max_norm_ratio: a function of the LM, the sites and the text; runs the LM once."""
        ratio = self.text.max_norm_ratio
        if ratio is None:
            return None
        return estimate_norm_filter(self.read, self.store, ratio, self.text.lm_batch_rows)

    def train_dataloader(self) -> Stream:
        return self._stream(self.store, self.norm_filter)

    def statistics(self, n_tokens: int = 65_536) -> dict[str, SiteStatistics]:
        """Site name -> statistics over the first rows of the text; the stream does not move.

        Warns where many of these tokens are unknown to the tokenizer.
        """
        tokens = self.store.rows(0, self.store.wait_counted(n_tokens))
        warn_of_unknown(self.lm.tokenizer, self.store.name, tokens, self.store.mask(tokens))
        return estimate_statistics(self.read, self.store, n_tokens, self.text.lm_batch_rows, self.norm_filter)

    def heldout(self, n_tokens: int) -> Rows:
        return self.text.heldout(self.lm.tokenizer, n_tokens)

    def read(self, tokens: TokenIds) -> Mapping[str, Tensor]:
        """One LM pass: token ids [rows, ctx] on the CPU -> {site name: [rows, ctx, d]} on the LM's device."""
        device = self.lm.device
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        return activations(self.lm.model, self.sites, tokens.to(device, non_blocking=True))

    def _stream(self, store: TokenStore, norm_filter: NormFilter | None) -> Stream:
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

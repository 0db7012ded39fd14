"""What training uses: text, a frozen LM and sites as one LightningDataModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from lightning import LightningDataModule
from torch import Tensor

from dictlearn.data.normalize import SiteStatistics, estimate_statistics
from dictlearn.data.stream import ActivationStream
from dictlearn.data.text import Rows, TextData
from dictlearn.data.tokens import TokenStore
from dictlearn.lm.load import LM
from dictlearn.lm.taps import activations
from dictlearn.types import Site, TokenIds


class ActivationData(LightningDataModule):
    """Shuffled activations of `lm` at `sites`: `n_tokens` of them, in batches of `batch_size`.

    The order depends on `seed`, the text and its configuration alone. Lightning keeps the stream's position in
    its checkpoints; use max_steps with max_epochs=-1. The LM is in no module tree, so it is in no checkpoint.
    """

    def __init__(
        self, text: TextData, lm: LM, sites: Sequence[Site], batch_size: int, n_tokens: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.text, self.lm, self.sites = text, lm, tuple(sites)
        self.batch_size, self.n_tokens, self.seed = batch_size, n_tokens, seed

    @cached_property
    def store(self) -> TokenStore:
        """The rows that are trained on; tokenising starts when this is first used."""
        store = self.text.train(self.lm.tokenizer)
        self._stream(store).prefetch()
        return store

    def train_dataloader(self) -> ActivationStream:
        return self._stream(self.store)

    def statistics(self, n_tokens: int = 65_536) -> dict[str, SiteStatistics]:
        """Site name -> statistics over the first rows of the text; the stream does not move."""
        return estimate_statistics(self.read, self.store, n_tokens, self.text.lm_batch_rows)

    def heldout(self, n_tokens: int) -> Rows:
        return self.text.heldout(self.lm.tokenizer, n_tokens)

    def read(self, tokens: TokenIds) -> Mapping[str, Tensor]:
        """One LM pass: token ids [rows, ctx] on the CPU -> {site name: [rows, ctx, d]} on the LM's device."""
        device = self.lm.device
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        return activations(self.lm.model, self.sites, tokens.to(device, non_blocking=True))

    def _stream(self, store: TokenStore) -> ActivationStream:
        return ActivationStream(
            self.read,
            store,
            batch_size=self.batch_size,
            n_tokens=self.n_tokens,
            seed=self.seed,
            lm_batch_rows=self.text.lm_batch_rows,
            block_rows=self.text.block_rows,
            n_slices=self.text.n_slices,
        )

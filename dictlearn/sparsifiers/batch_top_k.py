"""BatchTopK: the k * n_tokens largest pre-activations of a batch (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.kernels import encode_batch_top_k, top_entries
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.types import DictlearnError, Encoded, SparseLatents

MOST_BATCHES = 100  # of the window of the mean that the threshold is
WINDOW = 0.1  # of the run, at most


class BatchTopK(Sparsifier):
    """In training, ReLU of the `k` * n_tokens largest pre-activations of the batch: `k` a token on average.

    At inference a token must not depend on others: there, latents above one `threshold` fire, a mean over training
    batches of the smallest positive pre-activation that was kept, in float32. The inference dictionary has it as
    JumpReLU. Before the first step the threshold is 0.

    With m_i the smallest one of batch i of n, and w = min(100, a tenth of the steps of the run, but at least 1),

        threshold = sum_i (1 - 1/w)^(n - i) m_i / sum_i (1 - 1/w)^(n - i)

    so that in a short run it is that of the weights at the end as well.
    """

    compact: ClassVar[bool] = True
    per_token = False

    threshold: Float[Tensor, ""]
    n_seen: Float[Tensor, ""]  # batches

    def __init__(self, k: int) -> None:
        super().__init__()
        check_count("sparsifier.k", k)
        self.k = k
        self.n_latents = 0
        self.window = float(MOST_BATCHES)  # batches
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_seen", torch.zeros(()))

    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        return torch.where(pre_acts > self.threshold, pre_acts, 0.0)

    def encode_step(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        W_enc: Float[Tensor, "d_in n_latents"],
        b_enc: Float[Tensor, " n_latents"],
    ) -> Encoded:
        latents = encode_batch_top_k(x, W_enc, b_enc, self.k)
        self._follow_(latents.values.detach())
        return Encoded(latents)

    def select(self, pre_acts: Float[Tensor, "n_tokens n_latents"]) -> Encoded:
        n_tokens, n_latents = pre_acts.shape
        flat = pre_acts.flatten()
        kept = top_entries(flat.detach(), self.k * n_tokens)  # ascending: row by row
        starts = torch.arange(n_tokens + 1, device=flat.device) * n_latents
        values = flat[kept].relu()
        self._follow_(values.detach())
        return Encoded(SparseLatents(values, kept % n_latents, torch.searchsorted(kept, starts), n_latents))

    @torch.no_grad()
    def _follow_(self, values: Float[Tensor, " nnz"]) -> None:
        """Take the smallest positive one of `values` into the threshold; without one it stays.

        In training mode only (`Module.train`).
        """
        if not self.training:
            return
        least = torch.where(values > 0, values, torch.inf).float().amin() if len(values) else self.threshold
        found = least.isfinite()
        self.n_seen += found
        keep = 1 - 1 / self.window
        rate = (1 - keep) / (1 - keep**self.n_seen)  # of the newest one, among the weights so far
        self.threshold += torch.where(found, rate * (least - self.threshold), 0.0)

    def at(self, step: int, n_steps: int) -> None:  # noqa: ARG002
        self.window = max(1.0, min(MOST_BATCHES, WINDOW * n_steps))

    def bind(self, n_latents: int) -> None:
        if self.k > n_latents:
            raise DictlearnError(f"sparsifier.k must be at most n_latents = {n_latents}, got {self.k}.")
        self.n_latents = n_latents

    def scale_latents_(self, factor: Float[Tensor, " n_latents"]) -> None:
        if factor.is_meta:
            return  # shapes alone are checked
        if self.n_seen > 0 and not torch.equal(factor, factor[:1].expand_as(factor)):
            raise DictlearnError(
                "BatchTopK has one threshold for all latents, so they can be scaled by one factor only; the "
                "inference dictionary, which has one threshold for each, can be scaled freely."
            )
        self.threshold *= factor[0]

    def for_inference(self) -> JumpReLU:
        return JumpReLU.fixed(self.threshold.expand(self.n_latents))

    def config(self) -> dict[str, Any]:
        return {"k": self.k}

    @classmethod
    def tiny(cls) -> BatchTopK:
        return cls(k=4)

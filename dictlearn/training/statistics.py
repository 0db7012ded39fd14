"""What training counts as it goes: which latents fire, and the window's loss, FVU and L0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dictlearn.types import Latents, Scalar, SparseLatents, Step


class WindowMetrics(NamedTuple):
    """Means over the tokens of one window, as tensors on the device. `fvu` is about the window's own mean."""

    loss: Scalar
    fvu: Scalar
    l0: Scalar
    frac_dead: Scalar


class TrainingStatistics(nn.Module):
    """Accumulates on the device, without synchronising; `flush` ends a window of steps.

    A latent is dead when it has not fired for `dead_after_tokens` tokens, counted in tokens and judged at the end
    of each window. Everything that a later step depends on is in the state_dict, half-full windows included, so a
    resumed run continues exactly.
    """

    tokens_since_fired: Int[Tensor, " n_latents"]
    is_dead: Bool[Tensor, " n_latents"]
    fired: Int[Tensor, " n_latents"]  # firings in this window
    sums: Tensor  # [4]: loss, tokens, SSE, sum of squares of the target; float64
    target_sum: Tensor  # [n_writes * d_out]; float64
    n_finite: Int[Tensor, ""]  # steps of the run before the first whose loss was not finite
    is_finite: Bool[Tensor, ""]

    def __init__(self, n_latents: int, width: int, dead_after_tokens: int) -> None:
        super().__init__()
        self.dead_after_tokens = dead_after_tokens
        self.register_buffer("tokens_since_fired", torch.zeros(n_latents, dtype=torch.int64))
        self.register_buffer("is_dead", torch.zeros(n_latents, dtype=torch.bool))
        self.register_buffer("fired", torch.zeros(n_latents, dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("target_sum", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("n_finite", torch.zeros((), dtype=torch.int64))
        self.register_buffer("is_finite", torch.ones((), dtype=torch.bool))
        self._dead: Int[Tensor, " n_dead"] | None = None
        self._dead_is_current = False
        self.register_load_state_dict_post_hook(_forget_dead)

    @property
    def dead(self) -> Int[Tensor, " n_dead"] | None:
        """Indices of the dead latents, None if there are none; found anew once per window."""
        if not self._dead_is_current:  # the only place that waits for the device
            indices = self.is_dead.nonzero().squeeze(-1)
            self._dead = indices if len(indices) else None
            self._dead_is_current = True
        return self._dead

    @torch.no_grad()
    def count(self, step: Step) -> None:
        """Add the tokens of a step, or of a chunk of one.

        Sums over a token's width and over the tokens of one call are taken in float32, and summed up in float64.
        """
        _count_fired_(self.fired, step.latents)
        error = torch.linalg.vector_norm(step.target - step.recon, dim=-1).double().square().sum()
        sum_sq = torch.linalg.vector_norm(step.target, dim=-1).double().square().sum()
        self.sums[1:] += torch.stack([error.new_full((), len(step.x)), error, sum_sq])
        self.target_sum += step.target.sum(0)

    @torch.no_grad()
    def end_step(self, loss: Scalar, n_tokens: int) -> None:
        """Close a step of `n_tokens` counted tokens; `loss` is its total loss, a mean over them."""
        self.is_finite &= loss.isfinite()
        self.n_finite += self.is_finite
        self.sums[0] += loss.double() * n_tokens

    @torch.no_grad()
    def flush(self) -> WindowMetrics:
        """The window's metrics; starts the next window and decides which latents are dead in it."""
        loss, n_tokens, sse, sum_sq = self.sums.unbind()
        self.tokens_since_fired += n_tokens.long()
        self.tokens_since_fired.masked_fill_(self.fired > 0, 0)
        self.is_dead.copy_(self.tokens_since_fired >= self.dead_after_tokens)
        self._dead_is_current = False
        spread = sum_sq - self.target_sum.square().sum() / n_tokens
        metrics = WindowMetrics(
            loss=loss / n_tokens,
            fvu=sse / spread,
            l0=self.fired.sum() / n_tokens,
            frac_dead=self.is_dead.double().mean(),
        )
        for buffer in (self.fired, self.sums, self.target_sum):
            buffer.zero_()
        return metrics

    @torch.no_grad()
    def revive_(self, latents: Int[Tensor, " n"]) -> None:
        """`latents` have new weights: they count as having fired now."""
        self.tokens_since_fired[latents] = 0
        self.is_dead[latents] = False
        self._dead_is_current = False


def _forget_dead(statistics: TrainingStatistics, _: object) -> None:
    statistics._dead_is_current = False


def _count_fired_(fired: Int[Tensor, " n_latents"], latents: Latents) -> None:
    """Add to `fired` on how many tokens each latent is active."""
    if isinstance(latents, SparseLatents):
        fired.index_add_(0, latents.indices, (latents.values != 0).to(fired.dtype))
    else:
        fired.add_((latents != 0).flatten(0, -2).sum(0, dtype=torch.int32))

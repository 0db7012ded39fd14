"""Matryoshka: nested dictionaries, each prefix of the latents reconstructs by itself (Bussmann et al. 2025,
arXiv 2503.17547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.kernels import decode
from dictlearn.losses.recon import recon_loss
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.types import DictlearnError, Scalar, SparseLatents, Step

PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)


@dataclass(frozen=True)
class _NestedStep(Step):
    """With the reconstruction of every prefix; the last is that of the whole dictionary."""

    recons: Float[Tensor, "batch n_prefixes writes"] | None = None


class Matryoshka(Linear):
    """A linear dictionary whose loss is the mean of the reconstruction losses of nested prefixes of its latents.

    The first latents have to explain everything by themselves, so general features do not dissolve into special
    ones. Selection is that of the whole dictionary; all prefixes come from one decode, cut at their bounds and
    summed up. The inference dictionary is a linear one.

    Args:
        prefixes: ends of the prefixes, as ascending shares of the latents, the last 1.
        others: those of `Linear`.
    """

    nested: ClassVar[bool] = True
    inference_kind: ClassVar[str | None] = "linear"

    def __init__(self, *args: Any, prefixes: Sequence[float] = PREFIXES, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shares = list(prefixes) if isinstance(prefixes, Sequence) and not isinstance(prefixes, str) else []
        numbers = all(isinstance(p, int | float) and not isinstance(p, bool) and 0 < p <= 1 for p in shares)
        if not shares or not numbers or shares[-1] != 1 or shares != sorted(set(shares)):
            raise DictlearnError(
                f"prefixes must be ascending shares above 0 that end at 1, got {shares or repr(prefixes)}."
            )
        self.prefixes = tuple(float(share) for share in shares)
        self.ends = [round(share * self.n_latents) for share in self.prefixes]
        if self.ends[0] < 1 or len(set(self.ends)) < len(self.ends):
            raise DictlearnError(
                f"prefixes {shares} of {self.n_latents} latents end at {self.ends}: each needs latents of its own."
            )

    def step(
        self,
        x: Tensor,
        target: Tensor,
        variance: Float[Tensor, " n_writes"],
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Step:
        flat_x, flat_target = self.normalise(x), self.normalise_target(target, x)
        latents, pre_acts = self.encode_step(flat_x)
        sums = self._parts(latents).cumsum(1, dtype=self.b_dec.dtype)
        recons = sums + self.offset(flat_x).unsqueeze(-2)
        return _NestedStep(
            self, flat_x, flat_target, recons[:, -1], latents, variance, dead, pre_acts, recons=recons
        )

    def losses(self, step: Step) -> dict[str, Scalar]:
        assert isinstance(step, _NestedStep)
        assert step.recons is not None
        errors = step.target.unsqueeze(1) - step.recons
        return {"recon": recon_loss(step, errors.flatten(0, 1))}

    def _parts(self, latents: SparseLatents | Tensor) -> Float[Tensor, "batch n_prefixes writes"]:
        """What the latents between two bounds write, in one decode."""
        n = len(self.ends)
        if isinstance(latents, SparseLatents):
            group = torch.zeros_like(latents.indices)
            for end in self.ends[:-1]:  # a tensor of them would have to be sent to the device
                group += latents.indices >= end
            token = torch.repeat_interleave(latents.offsets.diff(), output_size=len(group))
            bag = token * n + group
            bag, order = bag.sort(stable=True)
            offsets = torch.searchsorted(bag, torch.arange(latents.n_tokens * n + 1, device=bag.device))
            cut = SparseLatents(latents.values[order], latents.indices[order], offsets, latents.n_latents)
            return decode(cut, self.flat_W_dec).view(latents.n_tokens, n, -1)
        starts = [0, *self.ends[:-1]]
        parts = [latents[:, a:b] @ self.flat_W_dec[a:b] for a, b in zip(starts, self.ends, strict=True)]
        return torch.stack(parts, dim=1)

    @torch.no_grad()
    def for_inference(self) -> Dictionary:
        return self.as_linear().for_inference()

    def config(self) -> dict[str, Any]:
        return {**super().config(), "prefixes": list(self.prefixes)}

    @classmethod
    def tiny(cls) -> Matryoshka:
        tiny = cls(d_in=6, d_out=6, n_latents=16, sparsifier=BatchTopK(k=4), prefixes=(0.25, 0.5, 1.0))
        tiny.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
        return tiny

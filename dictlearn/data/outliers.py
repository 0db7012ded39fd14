"""Tokens whose activations are far too large: a few of them would dominate losses, means and scales.

Some tokens of most language models (the first position, some punctuation) have a norm tens to thousands of times
the usual one (Sun et al. 2024, "Massive Activations in Large Language Models").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from dictlearn.types import Acts


class NormFilter(NamedTuple):
    """Keeps tokens with ||x|| <= limit at every site; `limits` is ratio x median norm, in activation units."""

    ratio: float
    limits: Mapping[str, float]

    def keep(self, acts: Mapping[str, Acts]) -> Bool[Tensor, "*batch"]:
        """True for the tokens that are kept; a norm that is NaN or infinite is above every limit."""
        within = [norms(acts[site]) <= limit for site, limit in self.limits.items()]
        return torch.stack(within).all(0)

    def describe(self) -> str:
        return ", ".join(f"{site}: {limit:.3g}" for site, limit in self.limits.items())


def norms(x: Acts) -> Tensor:
    """||x|| over the last axis, in float32 or better: the one rule of filter and median."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))

"""The dense product of the encoder alone: what no step with a dense encoder can be faster than."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def make_step(spec: dict[str, Any], x: torch.Tensor) -> Callable[[torch.Tensor], object]:
    dtype = torch.bfloat16 if spec["precision"] == "mixed" else torch.float32
    W = torch.randn(spec["n_latents"], spec["d"], device=spec["device"]).to(dtype)
    out = torch.empty(len(x), spec["n_latents"], device=spec["device"], dtype=dtype)
    return lambda x: torch.mm(x.to(dtype), W.T, out=out)

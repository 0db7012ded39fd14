"""A yardstick for a step with a dense encoder and Adam: the product, and moving the bytes of the weights once.

Each of the 2 d n_latents weights has its gradient written, and is read and written by Adam: 32 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import run_product
import torch

BYTES_PER_WEIGHT = 4 + 28  # gradient; gradient, weight and two moments read, weight and moments written


def make_step(spec: dict[str, Any], x: torch.Tensor) -> Callable[[torch.Tensor], object]:
    product = run_product.make_step(spec, x)
    n_bytes = 2 * spec["d"] * spec["n_latents"] * BYTES_PER_WEIGHT
    moved = torch.ones(n_bytes // 8, dtype=torch.float32, device=spec["device"])

    def step(x: torch.Tensor) -> object:
        moved.neg_()  # reads and writes all of it
        return product(x)

    return step

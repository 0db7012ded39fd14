"""sparsify: a step as its Trainer makes it, for one SparseCoder (TopK alone)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig


def make_step(spec: dict[str, Any], x: torch.Tensor) -> Callable[[torch.Tensor], object]:
    if spec["sparsifier"] != "top_k":
        raise NotImplementedError(f"sparsify has no {spec['sparsifier']}")
    cfg = SparseCoderConfig(num_latents=spec["n_latents"], k=spec["k"])
    sae = SparseCoder(spec["d"], cfg, spec["device"], dtype=torch.float32)
    sae.b_dec.data = x.mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4)
    since_fired = torch.zeros(spec["n_latents"], dtype=torch.long, device=spec["device"])
    n_dead = int(spec["dead_fraction"] * spec["n_latents"])

    def step(x: torch.Tensor) -> object:
        if n_dead:
            since_fired[:n_dead] = 10**9
        sae.set_decoder_norm_to_unit_norm()
        mask = since_fired > 10_000_000 if n_dead else None  # its default, auxk_alpha = 0, has none
        with torch.autocast(spec["device"], dtype=torch.bfloat16, enabled=spec["precision"] == "mixed"):
            out = sae(x, dead_mask=mask)
        fired = torch.zeros_like(since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(len(x))
        since_fired[fired] = 0
        return float(out.fvu)

    return step

"""sparsify: `save_to_disk` and `load_from_disk`."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import torch
from formats_worker import N_LATENTS, D, K, randomise
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

SHAPE = (D,)


def make(activation: str, transcode: bool, skip: bool, by_factor: bool) -> SparseCoder:
    size = {"expansion_factor": N_LATENTS // D} if by_factor else {"num_latents": N_LATENTS}
    cfg = SparseCoderConfig(activation=activation, k=K, transcode=transcode, skip_connection=skip, **size)
    made = SparseCoder(D, cfg)
    randomise(made)
    return made


KINDS = {
    f"{activation} {'transcoder' if transcode else 'autoencoder'}{' with skip' if skip else ''}, "
    f"{'expansion_factor' if by_factor else 'num_latents'}": partial(make, activation, transcode, skip, by_factor)
    for activation, transcode, skip, by_factor in product(("topk", "groupmax"), *[(False, True)] * 3)
}


def save(made: SparseCoder, folder: Path) -> SparseCoder:
    made.save_to_disk(folder)
    return made


def load(folder: Path) -> SparseCoder:
    return SparseCoder.load_from_disk(folder, device="cpu")


def compute(made: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    out = made(x)
    latents = torch.zeros(len(x), made.num_latents)
    return latents.scatter(-1, out.latent_indices, out.latent_acts), out.sae_out

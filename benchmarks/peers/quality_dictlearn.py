"""dictlearn: train.py with its defaults, on the activation store that the peers' files were written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from quality_worker import Batches, Trained, plain
from runs import run

from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.top_k import TopK


def train(job: dict[str, Any], _: Batches) -> Trained:
    (dictionary,) = run(job["overrides"], Path(job["out"]).with_suffix("")).values()
    sparsifier = dictionary.sparsifier
    rule: dict[str, Any] = {"threshold": torch.zeros(dictionary.n_latents)}
    if isinstance(sparsifier, TopK):
        rule = {"k": sparsifier.k}
    elif isinstance(sparsifier, JumpReLU):
        rule = {"threshold": sparsifier.thresholds}
    weights = plain(dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.b_dec, **rule)
    return Trained(weights, lambda x: dictionary(x).recon)

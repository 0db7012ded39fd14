"""dictlearn: the Learner's step with the optimiser that a run has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bare  # noqa: F401
import torch

from dictlearn.data import Batch
from dictlearn.dictionaries.linear import Linear
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import Learner
from dictlearn.training.optimizers import Adam, build_optimizer


def make_step(spec: dict[str, Any], x: torch.Tensor) -> Callable[[torch.Tensor], object]:
    sparsifiers = {
        "top_k": lambda: TopK(spec["k"]),
        "batch_top_k": lambda: BatchTopK(spec["k"]),
        "relu": lambda: ReLU(1.0),
        "jump_relu": lambda: JumpReLU(coefficient=1.0, penalty="l0", bandwidth=0.05),  # the peers' penalty
    }
    dictionary = Linear(
        d_in=spec["d"],
        d_out=spec["d"],
        n_latents=spec["n_latents"],
        reads=("x",),
        writes=("x",),
        sparsifier=sparsifiers[spec["sparsifier"]](),
    )
    mean = x.mean(0, keepdim=True).cpu()
    dictionary.initialise_(torch.Generator().manual_seed(0), mean, mean)
    variance = (x - x.mean(0)).square().sum(-1).mean().reshape(1).cpu()
    learner = Learner("x", dictionary, {"aux_k": AuxK()}, variance, 10**7, clip_norm=1.0).to(spec["device"])
    adam = Adam(lr=2e-4, lr_factor=1.0, betas=(0.9, 0.999), eps=1e-8, clip_norm=1.0)
    optimizer = build_optimizer([(dictionary, adam)])
    n_dead = int(spec["dead_fraction"] * spec["n_latents"])
    if n_dead:
        learner.statistics.is_dead[:n_dead] = True
    mixed = spec["precision"] == "mixed"
    zeros = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step(x: torch.Tensor) -> object:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=mixed):
            loss = learner.loss(Batch({"x": x}, zeros, zeros, zeros))
        loss.backward()
        learner.clip_gradients_()
        optimizer.step()
        optimizer.zero_grad()
        dictionary.project_()
        return loss

    return step

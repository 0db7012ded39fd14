"""SAELens: one step of its SAETrainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer


def make_step(spec: dict[str, Any], _: torch.Tensor) -> Callable[[torch.Tensor], object]:
    sizes = {
        "d_in": spec["d"],
        "d_sae": spec["n_latents"],
        "device": spec["device"],
        "normalize_activations": "none",
    }
    k = spec["k"]
    sae = {
        "top_k": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=k)),
        "batch_top_k": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=k)),
        "relu": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**sizes, l1_coefficient=1.0)),
        "jump_relu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**sizes, l0_coefficient=1.0)),
    }[spec["sparsifier"]]()
    cfg = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=spec["batch_size"],
        device=spec["device"],
        lr_end=3e-5,
        autocast=spec["precision"] == "mixed",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=cfg, sae=sae.to(spec["device"]), data_provider=iter(()))
    n_dead = int(spec["dead_fraction"] * spec["n_latents"])
    trainer.n_forward_passes_since_fired[:n_dead] = 10**6

    def step(x: torch.Tensor) -> object:
        if n_dead:
            trainer.n_forward_passes_since_fired[:n_dead] = 10**6  # they stay dead
        return trainer._train_step(sae=trainer.sae, sae_in=x)

    return step

"""SAELens: its SAETrainer with the settings of its documentation, saved and loaded for inference as its users do.

Adam 3e-4, decaying over the last fifth; activations scaled to a mean norm of the root of the width; L1 rises over a
twentieth of the run; JumpReLU in the variant it recommends (tanh, Anthropic's numbers, a ramp over the whole run).
"""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import torch
from quality_worker import Batches, Trained, plain
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

LR = 3e-4
MOST_NORM_BATCHES = 100


def train(job: dict[str, Any], batches: Batches) -> Trained:
    n_steps = len(batches)
    n_norm_batches = min(MOST_NORM_BATCHES, n_steps)
    cfg = SAETrainerConfig(
        total_training_samples=n_steps * job["batch_size"],
        train_batch_size_samples=job["batch_size"],
        lr=LR * job["lr_factor"],
        lr_end=LR,  # of other schedules than the constant one
        lr_decay_steps=n_steps // 5,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=n_norm_batches,
    )
    # the batches that the norm is estimated on are trained on as well
    data = itertools.chain(itertools.islice(iter(batches), n_norm_batches), batches)
    sae = SAETrainer(cfg=cfg, sae=make_sae(job, n_steps), data_provider=data).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return exported(SAE.load_from_disk(folder, device="cpu"))


def make_sae(job: dict[str, Any], n_steps: int) -> Any:
    sizes = {
        "d_in": job["d"],
        "d_sae": job["n_latents"],
        "device": "cpu",
        "normalize_activations": "expected_average_only_in",
    }
    value = job["value"]
    l1 = {"l1_coefficient": value, "l1_warm_up_steps": n_steps // 20}
    tanh = {
        "l0_coefficient": value,
        "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_bandwidth": 2.0,
        "jumprelu_init_threshold": 0.1,
        "pre_act_loss_coefficient": 3e-6,
        "l0_warm_up_steps": n_steps,
    }
    return {
        "top_k": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=value)),
        "batch_top_k": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=value)),
        "relu": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**sizes, **l1)),
        "jump_relu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**sizes, **tanh)),
        "gated": lambda: GatedTrainingSAE(GatedTrainingSAEConfig(**sizes, **l1)),
        "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**sizes, k=value, matryoshka_widths=list(job["prefixes"]))
        ),
    }[job["architecture"]]()


def exported(sae: Any) -> Trained:
    """Of the inference SAE: in the layout that all peers share."""
    shift = sae.b_dec @ sae.W_enc if sae.cfg.apply_b_dec_to_input else torch.zeros(sae.cfg.d_sae)
    kind = sae.cfg.architecture()
    if kind == "gated":  # open where the magnitude exceeds what it is at a gate of zero
        growth = sae.r_mag.exp()
        W_enc, b_enc = sae.W_enc * growth, sae.b_mag - shift * growth
        rule: dict[str, Any] = {"threshold": (sae.b_mag - growth * sae.b_gate).clamp_min(0)}
    else:
        W_enc, b_enc = sae.W_enc, sae.b_enc - shift
        rules = {"topk": lambda: {"k": sae.cfg.k}, "jumprelu": lambda: {"threshold": sae.threshold}}
        rule = rules.get(kind, lambda: {"threshold": torch.zeros(sae.cfg.d_sae)})()
    return Trained(plain(W_enc, b_enc, sae.W_dec, sae.b_dec, **rule), sae)

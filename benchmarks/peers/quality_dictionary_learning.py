"""dictionary_learning: its trainSAE with the settings of its demo.

Activations of unit mean square norm, the rate decaying over the last fifth. The TopK family has the rate of its
law; the others have that of the demo, since what Gated and JumpReLU have by default (5e-5, 7e-5) is for far longer
runs. Warm-ups, and when the threshold is first measured, are the shares of a run that they have in the demo.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from quality_worker import Batches, Trained, plain

LR, LAW_LR, LAW_LATENTS = 3e-4, 2e-4, 2**14
GROUPS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]
WARMUP, SPARSITY_WARMUP, THRESHOLD_START, DECAY_START = 1 / 20, 1 / 5, 1 / 20, 4 / 5  # of the run


def train(job: dict[str, Any], batches: Batches) -> Trained:
    torch.manual_seed(job["seed"])
    n_steps, architecture, value = len(batches), job["architecture"], job["value"]
    law = LAW_LR / (job["n_latents"] / LAW_LATENTS) ** 0.5
    from_law = {"lr": law * job["lr_factor"], "k": value, "threshold_start_step": int(THRESHOLD_START * n_steps)}
    penalised = {"lr": LR * job["lr_factor"], "sparsity_warmup_steps": int(SPARSITY_WARMUP * n_steps)}
    trainers: dict[str, dict[str, Any]] = {
        "top_k": {"trainer": TopKTrainer, **from_law},
        "batch_top_k": {"trainer": BatchTopKTrainer, **from_law},
        "matryoshka": {"trainer": MatryoshkaBatchTopKTrainer, "group_fractions": GROUPS, **from_law},
        "relu": {"trainer": StandardTrainer, "l1_penalty": value, **penalised},
        "gated": {"trainer": GatedSAETrainer, "l1_penalty": value, **penalised},
        "jump_relu": {"trainer": JumpReluTrainer, "target_l0": value, **penalised},
    }
    config = {
        **trainers[architecture],
        "activation_dim": job["d"],
        "dict_size": job["n_latents"],
        "layer": 0,
        "lm_name": "none",
        "steps": n_steps,
        "warmup_steps": int(WARMUP * n_steps),
        "decay_start": int(DECAY_START * n_steps),
        "device": "cpu",
        "seed": job["seed"],
    }
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(batches, [config], n_steps, save_dir=folder, normalize_activations=True, device="cpu")
        state = torch.load(Path(folder) / "trainer_0" / "ae.pt")
    return exported(architecture, state, job)


def exported(architecture: str, state: dict[str, torch.Tensor], job: dict[str, Any]) -> Trained:
    """In the layout that all peers share; reconstruction by the package's own classes."""
    d, n, value = job["d"], job["n_latents"], job["value"]
    makers = {
        "top_k": lambda: AutoEncoderTopK(d, n, value),
        "batch_top_k": lambda: BatchTopKSAE(d, n, value),
        "matryoshka": lambda: MatryoshkaBatchTopKSAE(d, n, value, state["group_sizes"].tolist()),
        "relu": lambda: AutoEncoder(d, n),
        "gated": lambda: GatedAutoEncoder(d, n),
        "jump_relu": lambda: JumpReluAutoEncoder(d, n),
    }
    sae = makers[architecture]()
    sae.load_state_dict(state)
    zeros = torch.zeros(n)
    if "W_enc" in state:
        W_enc, W_dec = sae.W_enc, sae.W_dec
    else:
        W_enc, W_dec = sae.encoder.weight.T, sae.decoder.weight.T
    if architecture == "jump_relu":  # its input is not centred
        weights = plain(W_enc, sae.b_enc, W_dec, sae.b_dec, threshold=sae.threshold.clamp_min(0))
    elif architecture == "gated":  # open where the magnitude exceeds what it is at a gate of zero
        growth, b_dec = sae.r_mag.exp(), sae.decoder_bias
        threshold = (sae.mag_bias - growth * sae.gate_bias).clamp_min(0)
        b_enc = sae.mag_bias - b_dec @ W_enc * growth
        weights = plain(W_enc * growth, b_enc, W_dec, b_dec, threshold=threshold)
    else:
        b_dec = sae.bias if architecture == "relu" else sae.b_dec
        b_enc = (sae.b_enc if "b_enc" in state else sae.encoder.bias) - b_dec @ W_enc
        threshold = zeros if architecture == "relu" else sae.threshold.clamp_min(0).expand(n)
        rule: dict[str, Any] = {"k": value} if architecture == "top_k" else {"threshold": threshold}
        weights = plain(W_enc, b_enc, W_dec, b_dec, **rule)
    return Trained(weights, sae)

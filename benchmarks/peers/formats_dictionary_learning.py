"""dictionary_learning: `trainSAE`, which saves after no steps, and `load_dictionary`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoderNew, Dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from formats_worker import N_LATENTS, N_TOKENS, D, K, randomise
from torch import Tensor

SHAPE = (D,)
THRESHOLD = 1.5
Save = Callable[[Path], None]


def by_trainer(trainer: type, *, normalised: bool = False, threshold: float | None = None, **settings: Any) -> Save:
    """What saves the dictionary of a trainer in random weights, trained on activations in units of their norm
    where `normalised`."""

    def made(**config: Any) -> Any:
        found = trainer(**config)
        randomise(found.ae)
        if threshold is not None:
            found.ae.threshold.fill_(threshold)
        return found

    def save(folder: Path) -> None:
        sizes = {"activation_dim": D, "dict_size": N_LATENTS, "layer": 1, "lm_name": "gpt2", "steps": 100_000}
        config = {"trainer": made, "device": "cpu", **sizes, **settings}
        batches = [3 * torch.randn(N_TOKENS, D)]
        trainSAE(batches, [config], 0, save_dir=str(folder), normalize_activations=normalised, device="cpu")
        for file in (folder / "trainer_0").iterdir():
            shutil.move(file, folder / file.name)

    return save


def by_hand(made: Dictionary, folder: Path) -> None:
    """Of a class that no trainer has."""
    folder.mkdir()
    torch.save(made.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": type(made).__name__, "activation_dim": D, "dict_size": N_LATENTS}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


def auto_encoder_new() -> Save:
    made = AutoEncoderNew(D, N_LATENTS)
    randomise(made)
    return partial(by_hand, made)


GROUPS = [0.25, 0.25, 0.5]
KINDS: dict[str, Callable[[], Save]] = {
    "AutoEncoder, StandardTrainer": partial(by_trainer, StandardTrainer),
    "AutoEncoder, StandardTrainerAprilUpdate": partial(by_trainer, StandardTrainerAprilUpdate),
    "AutoEncoder, PAnnealTrainer": partial(by_trainer, PAnnealTrainer),
    "AutoEncoder, normalised": partial(by_trainer, StandardTrainer, normalised=True),
    "AutoEncoderNew": auto_encoder_new,
    "GatedAutoEncoder, GatedSAETrainer": partial(by_trainer, GatedSAETrainer),
    "GatedAutoEncoder, GatedAnnealTrainer": partial(by_trainer, GatedAnnealTrainer),
    "GatedAutoEncoder, normalised": partial(by_trainer, GatedSAETrainer, normalised=True),
    "AutoEncoderTopK, TopKTrainer": partial(by_trainer, TopKTrainer, k=K, threshold=THRESHOLD),
    "AutoEncoderTopK, normalised": partial(by_trainer, TopKTrainer, k=K, normalised=True),
    "BatchTopKSAE, BatchTopKTrainer": partial(by_trainer, BatchTopKTrainer, k=K, threshold=THRESHOLD),
    "BatchTopKSAE, no threshold yet": partial(by_trainer, BatchTopKTrainer, k=K),
    "BatchTopKSAE, normalised": partial(by_trainer, BatchTopKTrainer, k=K, threshold=THRESHOLD, normalised=True),
    "MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer": partial(
        by_trainer, MatryoshkaBatchTopKTrainer, k=K, group_fractions=GROUPS, threshold=THRESHOLD
    ),
    "MatryoshkaBatchTopKSAE, normalised": partial(
        by_trainer, MatryoshkaBatchTopKTrainer, k=K, group_fractions=GROUPS, threshold=THRESHOLD, normalised=True
    ),
    "JumpReluAutoEncoder, JumpReluTrainer": partial(by_trainer, JumpReluTrainer),
    "JumpReluAutoEncoder, thresholds below 0": partial(by_trainer, JumpReluTrainer, threshold=-THRESHOLD),
    "JumpReluAutoEncoder, normalised": partial(by_trainer, JumpReluTrainer, normalised=True),
}


def save(made: Save, folder: Path) -> Dictionary:
    """What its loader makes of the files, since it gives the decoders of AutoEncoder unit norm."""
    made(folder)
    return load(folder)


def load(folder: Path) -> Dictionary:
    return load_dictionary(str(folder), device="cpu")[0]


def compute(made: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    latents = made.encode(x)
    return latents, made.decode(latents)

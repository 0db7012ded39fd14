"""sparsify: its Trainer with its defaults (sign descent without a schedule, FVU, no AuxK).

It reads the output of a model's module; here that module looks activations up by their number.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from quality_worker import Batches, Trained, plain
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

LAW_LR, LAW_LATENTS = 5e-3, 2**14  # its default rate


class Stored(nn.Module):
    """Batch numbers [1, batch_size], all of them the same number, to its activations [1, batch_size, d]."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.batches[int(input_ids[0, 0])].unsqueeze(0)


class Model(nn.Module):
    """What the Trainer asks of a language model."""

    device = torch.device("cpu")

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.site = Stored(batches)
        self.dummy_inputs = {"input_ids": torch.zeros(1, batches.batch_size, dtype=torch.long)}

    @property
    def base_model(self) -> Model:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(input_ids)


class Numbers(Dataset):
    """One row for each batch."""

    def __init__(self, batches: Batches) -> None:
        self.n, self.batch_size = len(batches), batches.batch_size

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.full((self.batch_size,), index)}


def train(job: dict[str, Any], batches: Batches) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=job["n_latents"], k=job["value"]),
            batch_size=1,
            lr=job["lr_factor"] * LAW_LR / (job["n_latents"] / LAW_LATENTS) ** 0.5,
            hookpoints=["site"],
            init_seeds=[job["seed"]],
            save_every=10**9,
            save_dir=folder,
            run_name="run",
            log_to_wandb=False,
        )
        Trainer(cfg, Numbers(batches), Model(batches)).fit()
        sae = SparseCoder.load_from_disk(Path(folder) / "run" / "site", device="cpu")
    W_enc = sae.encoder.weight.T
    weights = plain(W_enc, sae.encoder.bias - sae.b_dec @ W_enc, sae.W_dec, sae.b_dec, k=job["value"])
    return Trained(weights, lambda x: sae(x).sae_out)

"""sparsify: its Trainer on the base model, as its command line loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lms import TOKENS
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch.utils.data import Dataset
from transformers import AutoModel


class Rows(Dataset):
    """Token rows again and again; the gate stands before each batch."""

    def __init__(self, tokens: np.ndarray, batch_rows: int, gate: Any) -> None:
        self.tokens, self.batch_rows, self.gate = torch.from_numpy(tokens), batch_rows, gate

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index % self.batch_rows == 0:
            self.gate.step()
        return {"input_ids": self.tokens[index % len(self.tokens)]}


def fit(spec: dict[str, Any], gate: Any) -> None:
    mixed, device = spec["precision"] == "mixed", spec["device"]
    dtype = torch.bfloat16 if mixed else torch.float32
    model = AutoModel.from_pretrained(spec["folder"], dtype=dtype).to(device)
    batch_rows = spec["batch_size"] // spec["ctx"]
    layers = "layers" if model.config.model_type == "gpt_neox" else "h"
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=spec["n_latents"], k=spec["k"]),
        batch_size=batch_rows,
        hookpoints=[f"{layers}.{spec['layer']}"],
        save_every=10**9,
        log_to_wandb=False,
    )
    gate.loaded()
    trainer = Trainer(cfg, Rows(np.load(Path(spec["folder"]) / TOKENS), batch_rows, gate), model)
    if mixed and device == "cpu":  # its own autocast is for CUDA alone
        for sae in trainer.saes.values():
            sae.forward = torch.autocast("cpu", dtype=torch.bfloat16)(sae.forward)
    trainer.fit()

"""dictionary_learning: one `update` of its trainers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer


def make_step(spec: dict[str, Any], _: torch.Tensor) -> Callable[[torch.Tensor], object]:
    common: dict[str, Any] = {
        "steps": 10**6,
        "activation_dim": spec["d"],
        "dict_size": spec["n_latents"],
        "layer": 0,
        "lm_name": "none",
        "device": spec["device"],
        "seed": 0,
    }
    k = spec["k"]
    trainer = {
        "top_k": lambda: TopKTrainer(**common, k=k),
        "batch_top_k": lambda: BatchTopKTrainer(**common, k=k),
        "relu": lambda: StandardTrainer(**common),
        "jump_relu": lambda: JumpReluTrainer(**common),
    }[spec["sparsifier"]]()
    n_dead = int(spec["dead_fraction"] * spec["n_latents"])
    mixed = spec["precision"] == "mixed"
    autocast = torch.autocast(spec["device"], dtype=torch.bfloat16) if mixed else contextlib.nullcontext()
    n_steps = 0

    def step(x: torch.Tensor) -> object:
        nonlocal n_steps
        if n_dead:
            trainer.num_tokens_since_fired[:n_dead] = 10**9
        with autocast:
            loss = trainer.update(n_steps, x)
        n_steps += 1
        return loss

    return step

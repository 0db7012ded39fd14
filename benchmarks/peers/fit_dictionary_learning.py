"""dictionary_learning: trainSAE over its ActivationBuffer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from lms import TOKENS
from nnsight import LanguageModel
from transformers import BatchEncoding


class Gated:
    """The buffer behind the gate. On a CPU trainSAE has no autocast: `mixed` is for that."""

    def __init__(self, buffer: Any, gate: Any) -> None:
        self.buffer, self.gate = buffer, gate

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        self.gate.step()
        return next(self.buffer)


class TokenBuffer(ActivationBuffer):
    """The buffer on rows of token ids: it would tokenise text."""

    def text_batch(self, batch_size: int | None = None) -> BatchEncoding:
        rows = torch.stack(super().text_batch(batch_size))
        return BatchEncoding({"input_ids": rows, "attention_mask": torch.ones_like(rows)})


class MixedTopK(TopKTrainer):
    """TopK under autocast on a CPU, as trainSAE has it on CUDA."""

    def update(self, step: int, x: torch.Tensor) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().update(step, x)


def fit(spec: dict[str, Any], gate: Any) -> None:
    mixed, on_cpu = spec["precision"] == "mixed", spec["device"] == "cpu"
    dtype = torch.bfloat16 if mixed else torch.float32
    model = LanguageModel(spec["folder"], device_map=spec["device"], dispatch=True, torch_dtype=dtype)
    lm = model._model
    neox = lm.config.model_type == "gpt_neox"
    tokens = torch.from_numpy(np.load(Path(spec["folder"]) / TOKENS))
    buffer = TokenBuffer(
        (tokens[index % len(tokens)] for index in count()),
        model,
        (model.gpt_neox.layers if neox else model.transformer.h)[spec["layer"]],
        d_submodule=lm.config.hidden_size,
        n_ctxs=spec["buffer_rows"],
        ctx_len=spec["ctx"],
        refresh_batch_size=spec["lm_batch_rows"],
        out_batch_size=spec["batch_size"],
        device=spec["device"],
    )
    gate.loaded()
    config = {
        "trainer": MixedTopK if mixed and on_cpu else TopKTrainer,
        "activation_dim": lm.config.hidden_size,
        "dict_size": spec["n_latents"],
        "k": spec["k"],
        "layer": spec["layer"],
        "lm_name": spec["folder"],
        "steps": 10**6,
        "device": spec["device"],
    }
    trainSAE(
        Gated(buffer, gate),
        [config],
        steps=10**6,
        device=spec["device"],
        autocast_dtype=dtype if not on_cpu else torch.float32,
    )

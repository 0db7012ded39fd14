"""Language models of known shapes with random weights, and random token ids, made on the spot.

Random weights cost what trained ones do. A tokenizer that knows no text is saved beside them, because most programs
open one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

TOKENS, DOCUMENTS = "tokens.npy", "documents.jsonl"
N_ROWS = 4096
CTX = 128

SHAPES: dict[str, dict[str, Any]] = {
    "pythia-70m": {
        "model_type": "gpt_neox",
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
        "bos_token_id": 50256,
    },
    "tiny": {  # of tests
        "model_type": "gpt_neox",
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 101,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
    },
}
SHAPES["small"] = {**SHAPES["gpt2"], "n_embd": 256, "n_head": 4, "vocab_size": 5003, "bos_token_id": 0}


def save_lm(shape: str, folder: Path, n_rows: int = N_ROWS, seed: int = 0) -> None:
    """Weights, tokenizer and `n_rows` rows of CTX token ids, each BOS and random ones.

    The same rows are written as an array and as documents: lists of their token ids without BOS.
    """
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    settings = SHAPES[shape]
    bos, n_vocab = settings["bos_token_id"], settings["vocab_size"]
    config = AutoConfig.for_model(**settings, eos_token_id=bos)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    names = {f"t{index}": index for index in range(n_vocab)}
    backend = Tokenizer(models.WordLevel(names, unk_token=f"t{bos}"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=f"t{bos}", eos_token=f"t{bos}")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    drawn = np.random.default_rng(seed).integers(n_vocab - 1, size=(n_rows, CTX - 1))
    drawn += drawn >= bos  # any but BOS
    np.save(folder / TOKENS, np.insert(drawn, 0, bos, axis=1))
    with (folder / DOCUMENTS).open("w") as file:
        file.writelines(json.dumps({"tokens": row}) + "\n" for row in drawn.tolist())

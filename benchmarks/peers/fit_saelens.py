"""SAELens: its LanguageModelSAETrainingRunner, with TransformerLens' model, which stops at the layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lms import TOKENS
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_neox_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


def hooked(folder: str, device: str) -> HookedTransformer:
    """The LM in TransformerLens; its own loader knows names on the Hub alone."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = lm.config
    shared = {
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_head": config.hidden_size // config.num_attention_heads,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "normalization_type": "LN",
        "device": device,
    }
    if config.model_type == "gpt_neox":
        cfg = HookedTransformerConfig(
            **shared,
            d_mlp=config.intermediate_size,
            act_fn=config.hidden_act,
            eps=config.layer_norm_eps,
            positional_embedding_type="rotary",
            rotary_dim=round(0.25 * shared["d_head"]),
            rotary_adjacent_pairs=False,
            parallel_attn_mlp=True,
        )
        state = convert_neox_weights(lm, cfg)
    else:
        cfg = HookedTransformerConfig(**shared, act_fn=config.activation_function, eps=config.layer_norm_epsilon)
        state = convert_gpt2_weights(lm, cfg)
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    missing = model.load_state_dict(state, strict=False).missing_keys
    wrong = [name for name in missing if not name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos", "b_U"))]
    if wrong:
        raise ValueError(f"TransformerLens lacks {wrong[:4]}")
    return model.eval()


class Gated:
    """The store behind the gate."""

    def __init__(self, store: Any, gate: Any) -> None:
        self.store, self.gate = store, gate

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        self.gate.step()
        return next(self.store)


def fit(spec: dict[str, Any], gate: Any) -> None:
    model = hooked(spec["folder"], spec["device"])
    tokens = np.load(Path(spec["folder"]) / TOKENS)
    mixed = spec["precision"] == "mixed"
    d = model.cfg.d_model
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=d, d_sae=spec["n_latents"], k=spec["k"], device=spec["device"]),
        model_name=spec["folder"],
        hook_name=f"blocks.{spec['layer']}.hook_resid_post",
        context_size=spec["ctx"],
        training_tokens=10**9,
        train_batch_size_tokens=spec["batch_size"],
        n_batches_in_buffer=max(20, -(-spec["batch_size"] // spec["ctx"])),
        device=spec["device"],
        autocast=mixed,
        autocast_lm=mixed,
        compile_sae=spec.get("compile", False),
        compile_llm=spec.get("compile", False),
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    dataset = Dataset.from_dict({"tokens": tokens})
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    gate.loaded()
    runner.activations_store = Gated(runner.activations_store, gate)
    runner.run()

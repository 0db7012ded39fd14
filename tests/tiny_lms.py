"""Tiny random language models with a word tokenizer, saved to disk in the Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

N_POSITIONS = 64
N_HEADS = 2
BOS, UNK = "<bos>", "<unk>"  # token ids 0 and 1; word i is "w{i}" with token id i

ConfigMaker = Callable[[int, int, int], PretrainedConfig]  # vocab, n_layers, d_model


def _gpt2(vocab: int, n_layers: int, d_model: int) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=vocab,
        n_layer=n_layers,
        n_embd=d_model,
        n_head=N_HEADS,
        n_positions=N_POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    )


def _neox(parallel: bool) -> ConfigMaker:
    def make(vocab: int, n_layers: int, d_model: int) -> PretrainedConfig:
        return GPTNeoXConfig(
            vocab_size=vocab,
            num_hidden_layers=n_layers,
            hidden_size=d_model,
            intermediate_size=4 * d_model,
            num_attention_heads=N_HEADS,
            max_position_embeddings=N_POSITIONS,
            use_parallel_residual=parallel,
            bos_token_id=0,
            eos_token_id=0,
        )

    return make


def _llama_like(config: Callable[..., PretrainedConfig], **extra: Any) -> ConfigMaker:
    def make(vocab: int, n_layers: int, d_model: int) -> PretrainedConfig:
        return config(
            vocab_size=vocab,
            num_hidden_layers=n_layers,
            hidden_size=d_model,
            intermediate_size=3 * d_model,
            num_attention_heads=N_HEADS,
            num_key_value_heads=1,
            max_position_embeddings=N_POSITIONS,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
            **extra,
        )

    return make


def _gemma3(vocab: int, n_layers: int, d_model: int) -> PretrainedConfig:
    """As the larger ones are released: the language model beside one that sees images."""
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    text = CONFIGS["gemma3_text"](vocab, n_layers, d_model)
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=vocab + 1)


def _gptj(vocab: int, n_layers: int, d_model: int) -> PretrainedConfig:
    return GPTJConfig(
        vocab_size=vocab,
        n_layer=n_layers,
        n_embd=d_model,
        n_head=N_HEADS,
        n_positions=N_POSITIONS,
        rotary_dim=4,
        bos_token_id=0,
        eos_token_id=0,
    )


def _opt(pre_norm: bool) -> ConfigMaker:
    def make(vocab: int, n_layers: int, d_model: int) -> PretrainedConfig:
        return OPTConfig(
            vocab_size=vocab,
            num_hidden_layers=n_layers,
            hidden_size=d_model,
            word_embed_proj_dim=d_model if pre_norm else d_model // 2,
            ffn_dim=4 * d_model,
            num_attention_heads=N_HEADS,
            max_position_embeddings=N_POSITIONS,
            do_layer_norm_before=pre_norm,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )

    return make


SMALL_WINDOW = {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 5}

CONFIGS: dict[str, ConfigMaker] = {
    "gpt2": _gpt2,
    "gpt_neox": _neox(parallel=True),
    "gpt_neox_sequential": _neox(parallel=False),
    "llama": _llama_like(LlamaConfig),
    "mistral": _llama_like(MistralConfig, sliding_window=4),
    "qwen2": _llama_like(Qwen2Config),
    "qwen3": _llama_like(Qwen3Config, head_dim=12),  # heads wider together than d_model
    "phi3": _llama_like(Phi3Config, sliding_window=4),
    "gemma": _llama_like(GemmaConfig, head_dim=12),
    "gemma2": _llama_like(Gemma2Config, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **SMALL_WINDOW),
    "gemma3_text": _llama_like(Gemma3TextConfig, sliding_window_pattern=2, **SMALL_WINDOW),
    "gemma3": _gemma3,
    "olmo2": _llama_like(Olmo2Config),
    "opt": _opt(pre_norm=True),
    "opt_post_norm": _opt(pre_norm=False),
    "phi": _llama_like(PhiConfig),
    "gptj": _gptj,  # a family without readable site names
}


def tiny_lm_folder(
    path: str | Path, family: str = "gpt2", vocab: int = 97, n_layers: int = 3, d_model: int = 16
) -> Path:
    """Save a random LM of `family` (a key of CONFIGS) and its tokenizer in `path`, and return the folder.

    The weights are spread out (every parameter gets noise of 0.2, biases and norm gains too), so that no two
    activations agree by accident. The words "w2" ... "w{vocab - 1}" have the ids 2 ... vocab - 1.
    The same arguments give the same weights; the global random state is left as it was.
    """
    folder = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](vocab, n_layers, d_model), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    word_ids = {BOS: 0, UNK: 1} | {f"w{i}": i for i in range(2, vocab)}
    words = Tokenizer(models.WordLevel(word_ids, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=BOS, eos_token=BOS, unk_token=UNK)
    tokenizer.save_pretrained(folder)
    return folder

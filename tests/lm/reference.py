"""Every readable site of the known families, computed from the weights in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Sites = dict[str, Tensor]
Weights = Mapping[str, Tensor]


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # [rows, heads, ctx, d_head]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention; keys and values may have fewer heads, each serving consecutive query heads."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)  # [rows, ctx, heads * d_head]


def _rotate(x: Tensor, n_rotary: int, base: float) -> Tensor:
    """Rotary positions on the first `n_rotary` entries of a head, entry i paired with entry i + n_rotary / 2."""
    half = n_rotary // 2
    angle = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(half) / half)  # [ctx, half]
    a, b, rest = x[..., :half], x[..., half:n_rotary], x[..., n_rotary:]
    rotated = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest)
    return torch.cat(rotated, dim=-1)


def _layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def gpt2(w: Weights, config, ids: Tensor) -> Sites:
    s: Sites = {"embed": w["transformer.wte.weight"][ids]}
    stream = s["embed"] + w["transformer.wpe.weight"][: ids.shape[1]]
    for i in range(config.n_layer):
        layer = f"transformer.h.{i}"

        def project(x: Tensor, name: str, layer: str = layer) -> Tensor:  # stored [in, out]
            return x @ w[f"{layer}.{name}.weight"] + w[f"{layer}.{name}.bias"]

        s[f"resid_pre.{i}"] = stream
        s[f"attn_in.{i}"] = _layer_norm(stream, w, f"{layer}.ln_1")
        q, k, v = project(s[f"attn_in.{i}"], "attn.c_attn").chunk(3, dim=-1)
        s[f"attn_z.{i}"] = _attention(*(_heads(x, config.n_head) for x in (q, k, v)))
        s[f"attn_out.{i}"] = project(s[f"attn_z.{i}"], "attn.c_proj")
        s[f"resid_mid.{i}"] = stream + s[f"attn_out.{i}"]
        s[f"mlp_in.{i}"] = _layer_norm(s[f"resid_mid.{i}"], w, f"{layer}.ln_2")
        s[f"mlp_hidden.{i}"] = F.gelu(project(s[f"mlp_in.{i}"], "mlp.c_fc"), approximate="tanh")
        s[f"mlp_out.{i}"] = project(s[f"mlp_hidden.{i}"], "mlp.c_proj")
        stream = s[f"resid_mid.{i}"] + s[f"mlp_out.{i}"]
        s[f"resid_post.{i}"] = stream
    return s


def gpt_neox(w: Weights, config, ids: Tensor) -> Sites:
    s: Sites = {"embed": w["gpt_neox.embed_in.weight"][ids]}
    stream = s["embed"]
    n_rotary = int(
        config.rope_parameters["partial_rotary_factor"] * config.hidden_size / config.num_attention_heads
    )
    for i in range(config.num_hidden_layers):
        layer = f"gpt_neox.layers.{i}"

        def project(x: Tensor, name: str, layer: str = layer) -> Tensor:
            return x @ w[f"{layer}.{name}.weight"].T + w[f"{layer}.{name}.bias"]

        s[f"resid_pre.{i}"] = stream
        s[f"attn_in.{i}"] = _layer_norm(stream, w, f"{layer}.input_layernorm")
        qkv = _heads(project(s[f"attn_in.{i}"], "attention.query_key_value"), config.num_attention_heads)
        q, k, v = qkv.chunk(3, dim=-1)  # each head holds its own q, k and v
        q, k = (_rotate(x, n_rotary, config.rope_parameters["rope_theta"]) for x in (q, k))
        s[f"attn_z.{i}"] = _attention(q, k, v)
        s[f"attn_out.{i}"] = project(s[f"attn_z.{i}"], "attention.dense")
        if not config.use_parallel_residual:
            s[f"resid_mid.{i}"] = stream + s[f"attn_out.{i}"]
        mlp_reads = s.get(f"resid_mid.{i}", stream)
        s[f"mlp_in.{i}"] = _layer_norm(mlp_reads, w, f"{layer}.post_attention_layernorm")
        s[f"mlp_hidden.{i}"] = F.gelu(project(s[f"mlp_in.{i}"], "mlp.dense_h_to_4h"))
        s[f"mlp_out.{i}"] = project(s[f"mlp_hidden.{i}"], "mlp.dense_4h_to_h")
        stream = stream + s[f"attn_out.{i}"] + s[f"mlp_out.{i}"]
        s[f"resid_post.{i}"] = stream
    return s


def llama(w: Weights, config, ids: Tensor) -> Sites:
    """Llama, Mistral, Qwen 2 (biases on q, k, v), Qwen 3 (norms on q, k), Gemma (gain 1 + w, scaled embedding)."""
    gemma = config.model_type == "gemma"

    def norm(x: Tensor, name: str) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return x * (w[f"{name}.weight"] + gemma)

    s: Sites = {"embed": w["model.embed_tokens.weight"][ids] * (config.hidden_size**0.5 if gemma else 1)}
    stream = s["embed"]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"

        def project(x: Tensor, name: str, layer: str = layer) -> Tensor:
            return x @ w[f"{layer}.{name}.weight"].T + w.get(f"{layer}.{name}.bias", torch.zeros(()))

        s[f"resid_pre.{i}"] = stream
        s[f"attn_in.{i}"] = x = norm(stream, f"{layer}.input_layernorm")
        q = _heads(project(x, "self_attn.q_proj"), config.num_attention_heads)
        k = _heads(project(x, "self_attn.k_proj"), config.num_key_value_heads)
        v = _heads(project(x, "self_attn.v_proj"), config.num_key_value_heads)
        if config.model_type == "qwen3":
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k = (_rotate(x, x.shape[-1], config.rope_parameters["rope_theta"]) for x in (q, k))
        s[f"attn_z.{i}"] = _attention(q, k, v)
        s[f"attn_out.{i}"] = project(s[f"attn_z.{i}"], "self_attn.o_proj")
        s[f"resid_mid.{i}"] = stream + s[f"attn_out.{i}"]
        s[f"mlp_in.{i}"] = x = norm(s[f"resid_mid.{i}"], f"{layer}.post_attention_layernorm")
        gate = project(x, "mlp.gate_proj")
        gate = F.gelu(gate, approximate="tanh") if gemma else F.silu(gate)
        s[f"mlp_hidden.{i}"] = gate * project(x, "mlp.up_proj")
        s[f"mlp_out.{i}"] = project(s[f"mlp_hidden.{i}"], "mlp.down_proj")
        stream = s[f"resid_mid.{i}"] + s[f"mlp_out.{i}"]
        s[f"resid_post.{i}"] = stream
    return s


REFERENCES = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gpt_neox_sequential": gpt_neox,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "gemma": llama,
}

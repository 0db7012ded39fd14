"""Every readable site of the known families and the logits, computed from the weights in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Sites = dict[str, Tensor]
Weights = Mapping[str, Tensor]


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # [rows, heads, ctx, d_head]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, cap: float | None = None, window: int | None = None
) -> Tensor:
    """Causal softmax attention, [rows, heads, ctx, d_head] -> [rows, ctx, heads * d_head].

    Keys and values may have fewer heads, each serving consecutive query heads. `scale`: of the scores, None for
    1 / sqrt(d_head); `cap`: they become cap * tanh(scores / cap); `window`: positions seen, with one's own.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= (window or len(position)))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


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
        s[f"attn_z.{i}"] = _attention(_heads(q, config.n_head), _heads(k, config.n_head), _heads(v, config.n_head))
        s[f"attn_out.{i}"] = project(s[f"attn_z.{i}"], "attn.c_proj")
        s[f"resid_mid.{i}"] = stream + s[f"attn_out.{i}"]
        s[f"mlp_in.{i}"] = _layer_norm(s[f"resid_mid.{i}"], w, f"{layer}.ln_2")
        s[f"mlp_hidden.{i}"] = F.gelu(project(s[f"mlp_in.{i}"], "mlp.c_fc"), approximate="tanh")
        s[f"mlp_out.{i}"] = project(s[f"mlp_hidden.{i}"], "mlp.c_proj")
        stream = s[f"resid_mid.{i}"] + s[f"mlp_out.{i}"]
        s[f"resid_post.{i}"] = stream
    s["logits"] = _layer_norm(stream, w, "transformer.ln_f") @ w["lm_head.weight"].T
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
    s["logits"] = _layer_norm(stream, w, "gpt_neox.final_layer_norm") @ w["lm_head.weight"].T
    return s


def llama(w: Weights, config, ids: Tensor) -> Sites:
    """Llama and what differs from it in a few places.

    Mistral (every layer sees a window), Qwen 2 (biases on q, k, v), Qwen 3 (norms on q, k of a head), Phi 3 (q, k
    and v in one matrix, so both parts of the MLP; a window), Gemma (gain 1 + w, scaled embedding), Gemma 2 (norms
    on what attention and MLP add, capped scores and logits, every other layer sees a window), Gemma 3 (the same
    without caps; norms on q, k; another rotary base within windows), OLMo 2 (norms on what attention and MLP add
    and on all of q, k, none on what they read).
    """
    config = config.get_text_config()
    kind = config.model_type.removesuffix("_text")
    gemma, post_norms = kind.startswith("gemma"), kind in ("gemma2", "gemma3", "olmo2")
    base = "model.language_model" if "model.language_model.embed_tokens.weight" in w else "model"
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return x * (w[f"{name}.weight"] + gemma)

    s: Sites = {"embed": w[f"{base}.embed_tokens.weight"][ids] * (config.hidden_size**0.5 if gemma else 1)}
    stream = s["embed"]
    for i in range(config.num_hidden_layers):
        layer = f"{base}.layers.{i}"
        windowed = kind in ("mistral", "phi3") or (kind in ("gemma2", "gemma3") and i % 2 == 0)
        theta = config.rope_parameters
        if kind == "gemma3":
            theta = theta["sliding_attention" if windowed else "full_attention"]

        def project(x: Tensor, name: str, layer: str = layer) -> Tensor:
            return x @ w[f"{layer}.{name}.weight"].T + w.get(f"{layer}.{name}.bias", torch.zeros(()))

        s[f"resid_pre.{i}"] = stream
        s[f"attn_in.{i}"] = x = stream if kind == "olmo2" else norm(stream, f"{layer}.input_layernorm")
        if kind == "phi3":
            d_head = config.hidden_size // n_heads
            q, k, v = project(x, "self_attn.qkv_proj").split(
                [n_heads * d_head, n_kv * d_head, n_kv * d_head], dim=-1
            )
        else:
            q, k, v = (project(x, f"self_attn.{name}_proj") for name in "qkv")
        if kind == "olmo2":
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k, v = _heads(q, n_heads), _heads(k, n_kv), _heads(v, n_kv)
        if kind in ("qwen3", "gemma3"):
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k = (_rotate(x, x.shape[-1], theta["rope_theta"]) for x in (q, k))
        s[f"attn_z.{i}"] = _attention(
            q,
            k,
            v,
            scale=config.query_pre_attn_scalar**-0.5 if kind in ("gemma2", "gemma3") else None,
            cap=config.attn_logit_softcapping if kind == "gemma2" else None,
            window=config.sliding_window if windowed else None,
        )
        attn_out = project(s[f"attn_z.{i}"], "self_attn.o_proj")
        s[f"attn_out.{i}"] = norm(attn_out, f"{layer}.post_attention_layernorm") if post_norms else attn_out
        s[f"resid_mid.{i}"] = x = stream + s[f"attn_out.{i}"]
        if kind != "olmo2":
            before_mlp = "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
            x = norm(x, f"{layer}.{before_mlp}")
        s[f"mlp_in.{i}"] = x
        if kind == "phi3":
            gate, up = project(x, "mlp.gate_up_proj").chunk(2, dim=-1)
        else:
            gate, up = project(x, "mlp.gate_proj"), project(x, "mlp.up_proj")
        s[f"mlp_hidden.{i}"] = (F.gelu(gate, approximate="tanh") if gemma else F.silu(gate)) * up
        mlp_out = project(s[f"mlp_hidden.{i}"], "mlp.down_proj")
        s[f"mlp_out.{i}"] = norm(mlp_out, f"{layer}.post_feedforward_layernorm") if post_norms else mlp_out
        stream = s[f"resid_mid.{i}"] + s[f"mlp_out.{i}"]
        s[f"resid_post.{i}"] = stream
    s["logits"] = norm(stream, f"{base}.norm") @ w["lm_head.weight"].T
    if kind == "gemma2":
        s["logits"] = config.final_logit_softcapping * (s["logits"] / config.final_logit_softcapping).tanh()
    return s


def opt(w: Weights, config, ids: Tensor) -> Sites:
    """OPT, and the one with norms after each sum (and a narrower embedding), where fewer names exist."""
    pre_norm, base = config.do_layer_norm_before, "model.decoder"
    s: Sites = {"embed": w[f"{base}.embed_tokens.weight"][ids]}
    stream = s["embed"] if pre_norm else s["embed"] @ w[f"{base}.project_in.weight"].T
    stream = stream + w[f"{base}.embed_positions.weight"][2 : 2 + ids.shape[1]]
    for i in range(config.num_hidden_layers):
        layer = f"{base}.layers.{i}"

        def project(x: Tensor, name: str, layer: str = layer) -> Tensor:
            return x @ w[f"{layer}.{name}.weight"].T + w[f"{layer}.{name}.bias"]

        s[f"resid_pre.{i}"] = stream
        s[f"attn_in.{i}"] = x = _layer_norm(stream, w, f"{layer}.self_attn_layer_norm") if pre_norm else stream
        q, k, v = (_heads(project(x, f"self_attn.{name}_proj"), config.num_attention_heads) for name in "qkv")
        s[f"attn_z.{i}"] = _attention(q, k, v)
        attn_out = project(s[f"attn_z.{i}"], "self_attn.out_proj")
        stream = stream + attn_out
        if pre_norm:
            s[f"attn_out.{i}"], s[f"resid_mid.{i}"] = attn_out, stream
        else:
            stream = _layer_norm(stream, w, f"{layer}.self_attn_layer_norm")
        s[f"mlp_in.{i}"] = _layer_norm(stream, w, f"{layer}.final_layer_norm") if pre_norm else stream
        s[f"mlp_hidden.{i}"] = F.relu(project(s[f"mlp_in.{i}"], "fc1"))
        mlp_out = project(s[f"mlp_hidden.{i}"], "fc2")
        stream = stream + mlp_out
        if pre_norm:
            s[f"mlp_out.{i}"] = mlp_out
        else:
            stream = _layer_norm(stream, w, f"{layer}.final_layer_norm")
        s[f"resid_post.{i}"] = stream
    final = (
        _layer_norm(stream, w, f"{base}.final_layer_norm")
        if pre_norm
        else stream @ w[f"{base}.project_out.weight"].T
    )
    s["logits"] = final @ w["lm_head.weight"].T
    return s


def phi(w: Weights, config, ids: Tensor) -> Sites:
    """Phi 1, 1.5 and 2: attention and MLP read the same norm; rotary positions on a part of each head."""
    s: Sites = {"embed": w["model.embed_tokens.weight"][ids]}
    stream = s["embed"]
    n_rotary = int(
        config.rope_parameters["partial_rotary_factor"] * config.hidden_size / config.num_attention_heads
    )
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"

        def project(x: Tensor, name: str, layer: str = layer) -> Tensor:
            return x @ w[f"{layer}.{name}.weight"].T + w[f"{layer}.{name}.bias"]

        s[f"resid_pre.{i}"] = stream
        s[f"attn_in.{i}"] = s[f"mlp_in.{i}"] = x = _layer_norm(stream, w, f"{layer}.input_layernorm")
        q = _heads(project(x, "self_attn.q_proj"), config.num_attention_heads)
        k, v = (_heads(project(x, f"self_attn.{name}_proj"), config.num_key_value_heads) for name in "kv")
        q, k = (_rotate(x, n_rotary, config.rope_parameters["rope_theta"]) for x in (q, k))
        s[f"attn_z.{i}"] = _attention(q, k, v)
        s[f"attn_out.{i}"] = project(s[f"attn_z.{i}"], "self_attn.dense")
        s[f"mlp_hidden.{i}"] = F.gelu(project(s[f"mlp_in.{i}"], "mlp.fc1"), approximate="tanh")
        s[f"mlp_out.{i}"] = project(s[f"mlp_hidden.{i}"], "mlp.fc2")
        stream = stream + s[f"attn_out.{i}"] + s[f"mlp_out.{i}"]
        s[f"resid_post.{i}"] = stream
    s["logits"] = _layer_norm(stream, w, "model.final_layernorm") @ w["lm_head.weight"].T + w["lm_head.bias"]
    return s


REFERENCES = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gpt_neox_sequential": gpt_neox,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "phi3": llama,
    "gemma": llama,
    "gemma2": llama,
    "gemma3_text": llama,
    "gemma3": llama,
    "olmo2": llama,
    "opt": opt,
    "opt_post_norm": opt,
    "phi": phi,
}

"""Readable site names and the hook names of TransformerLens, which the ecosystem's files use."""

from __future__ import annotations

import re

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_hidden": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}
SITES = {hook: site for site, hook in HOOKS.items()}
NORMALISED = "ln2.hook_normalized"  # the residual stream behind the MLP's norm, without its gain and bias
NORMS = {  # of language models, by a part of their names: what they read behind, as an input norm
    r"gemma|llama|qwen|mistral|olmo-?2": "rms_norm",
    r"gpt2|gpt-neo|pythia|(^|/)opt-": "lm_layer_norm",
}


def to_hook_name(site: str) -> str:
    """`resid_post.2` to `blocks.2.hook_resid_post`; a name without a counterpart stays as it is."""
    if site == "embed":
        return "hook_embed"
    name, _, layer = site.partition(".")
    return f"blocks.{layer}.{HOOKS[name]}" if name in HOOKS and layer.isdigit() else site


def from_hook_name(hook: str) -> str:
    """The inverse of `to_hook_name`."""
    if hook == "hook_embed":
        return "embed"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    return f"{SITES[match[2]]}.{match[1]}" if match and match[2] in SITES else hook


def is_hook_name(name: str) -> bool:
    """Whether TransformerLens has this name, and not the LM a module of this path."""
    return name.startswith(("blocks.", "hook_"))


def input_norm_of(lm_name: object) -> str | None:
    """The input norm that makes `NORMALISED` of the residual stream, where the language model is known by name."""
    return next((norm for part, norm in NORMS.items() if re.search(part, str(lm_name).lower())), None)

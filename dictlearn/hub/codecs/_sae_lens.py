"""SAELens' inference files: the rule of each architecture, from a configuration in the words of version 6.

x~ is the normalised input, without b_dec where `apply_b_dec_to_input`. pre = x~ @ W_enc + b_enc; latents are its
ReLU (`standard`), those above the thresholds, or the k largest, by decoder norm where they are rescaled by it;
recon = latents @ W_dec + b_dec + x @ W_skip.T, put back by what the normalisation took off. `gated` ones have a
magnitude where their gate is open.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dictlearn.checks import check_flag
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub.canonical import Weights, check_finite, gate, linear
from dictlearn.hub.names import NORMALISED, from_hook_name, input_norm_of
from dictlearn.hub.weights import check_tensors
from dictlearn.registry import lookup
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
FIRST_VERSION = 6  # with the architecture's settings flat and the rest in `metadata`
# (sparsifier, autoencoder, skip) of a linear dictionary -> architecture in SAELens
NAMES = {
    ("relu", True, False): "standard",
    ("top_k", True, False): "topk",
    ("relu", False, False): "transcoder",
    ("relu", False, True): "skip_transcoder",
    ("abs_top_k", True, False): "abstopk",
    ("jump_relu", True, False): "jumprelu",
    ("jump_relu", False, False): "jumprelu_transcoder",
    ("jump_relu", False, True): "jumprelu_skip_transcoder",
}
GATED = "gated"
ARCHITECTURES = {name: key for key, name in NAMES.items()} | {GATED: ("jump_relu", True, False)}
REFUSED = {
    "temporal": "what its latents are depends on earlier tokens",
    "matching_pursuit": "its latents are found one after the other, by no encoder",
    "batchtopk": "it is a training checkpoint: save it for inference in SAELens",
    "matryoshka_batchtopk": "it is a training checkpoint: save it for inference in SAELens",
}
NORMS = ("none", "layer_norm", "constant_norm_rescale")  # the same words and rules there
CENTRED_SITES = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")  # that centring changes


def is_before_6(cfg: Mapping[str, Any]) -> bool:
    """Whether SAELens reads this configuration as one of an earlier version: by its number, or as it has none."""
    metadata = cfg.get("metadata", {})
    if not isinstance(metadata, Mapping) or "dictlearn" in metadata:
        return False
    version = cfg.get("sae_lens_version") or metadata.get("sae_lens_version")
    found = re.match(r"\d+", version) if isinstance(version, str) else None
    return found is None or int(found[0]) < FIRST_VERSION


def read_sae_lens(cfg: Mapping[str, Any], path: Path, w: Mapping[str, Tensor]) -> Linear:
    """The dictionary of a configuration and the tensors of the file `path`.

    Raises FormatError for wrong tensors; DictlearnError, or one of Python's own errors, for a wrong configuration.
    """
    architecture = cfg["architecture"]
    if why := REFUSED.get(architecture):
        raise DictlearnError(f"architecture={architecture} is not supported because {why}.")
    if architecture not in ARCHITECTURES:
        raise DictlearnError(f"architecture must be one of {sorted(ARCHITECTURES)}, got {architecture!r}.")
    kind, autoencoder, skip = ARCHITECTURES[architecture]
    metadata = cfg["metadata"]
    if (head := metadata.get("hook_head_index")) is not None:
        raise DictlearnError(f"hook_head_index={head} is not supported because no site is that of a single head.")
    hook = str(metadata.get("hook_name") or cfg.get("hook_name") or "x")
    normed = None if autoencoder else re.fullmatch(rf"blocks\.(\d+)\.{re.escape(NORMALISED)}", hook)
    read = f"resid_mid.{normed[1]}" if normed else from_hook_name(hook)
    write = read if autoencoder else from_hook_name(str(metadata.get("hook_name_out") or "y"))
    centred = is_centred(metadata) and read.partition(".")[0] in CENTRED_SITES
    rescale, b_dec_on_input = _flags(cfg, kind, autoencoder)
    sparsifier = _sparsifier(kind, cfg)
    input_norm = _input_norm(cfg.get("normalize_activations", "none"), centred)
    if normed:
        input_norm = _of_the_lm(metadata.get("model_name"), input_norm)

    d, n = cfg["d_in"], cfg["d_sae"]
    d_out = d if autoencoder else cfg["d_out"]
    shapes = {"W_enc": (d, n), "W_dec": (n, d_out), "b_dec": (d_out,)}
    names = ("b_gate", "r_mag", "b_mag") if architecture == GATED else ("b_enc",)
    names += ("threshold",) if kind == "jump_relu" and architecture != GATED else ()
    shapes |= {name: (n,) for name in names} | ({"W_skip": (d_out, d)} if skip else {})
    check_tensors(path, w, shapes)
    gates = gate(w["b_gate"], w["r_mag"], w["b_mag"]) if architecture == GATED else None
    b_enc, threshold = (gates.b_enc, gates.threshold) if gates else (w["b_enc"], w.get("threshold"))
    weights = Weights(w["W_enc"], b_enc, w["W_dec"], w["b_dec"], threshold, w.get("W_skip"))
    made = linear(
        path, weights, sparsifier, read, write, input_norm=input_norm, metadata=_metadata(metadata, centred)
    )
    _fold(made, gates.growth if gates else None, rescale=rescale, b_dec_on_input=b_dec_on_input)
    check_finite(path, made)
    return made


def is_centred(metadata: Mapping[str, Any]) -> bool:
    """Whether activations are of a model whose weights that write to the residual stream are centred."""
    kwargs = metadata.get("model_from_pretrained_kwargs")
    return isinstance(kwargs, Mapping) and kwargs.get("center_writing_weights") is True


def _flags(cfg: Mapping[str, Any], kind: str, autoencoder: bool) -> tuple[bool, bool]:
    """Whether pre-activations are rescaled by decoder norms, and b_dec is taken off the input."""
    rescale = cfg.get("rescale_acts_by_decoder_norm", False) if kind in ("top_k", "abs_top_k") else False
    b_dec_on_input = cfg.get("apply_b_dec_to_input", True)
    check_flag("rescale_acts_by_decoder_norm", rescale)
    check_flag("apply_b_dec_to_input", b_dec_on_input)
    if b_dec_on_input and not autoencoder:
        raise DictlearnError("apply_b_dec_to_input must be false in a transcoder, got true (or nothing).")
    return rescale, b_dec_on_input


def _sparsifier(kind: str, cfg: Mapping[str, Any]) -> Sparsifier | None:
    """None where there are thresholds."""
    if kind == "jump_relu":
        return None
    if kind == "relu":
        return ReLU(l1=0.0)
    made = lookup("dictlearn.sparsifiers", kind)(cfg["k"])
    made.bind(cfg["d_sae"])
    return made


def _input_norm(mode: object, centred: bool) -> str:
    if mode not in NORMS:
        raise DictlearnError(
            f"normalize_activations must be one of {', '.join(NORMS)} (other modes must be folded into the weights"
            f"), got {mode!r}."
        )
    if centred and mode == "constant_norm_rescale":
        raise DictlearnError(
            f"normalize_activations={mode} with center_writing_weights is not supported because no input_norm "
            "centres before it takes the norm."
        )
    return "centre" if centred and mode == "none" else str(mode)  # a layer norm centres as well


def _of_the_lm(lm_name: object, input_norm: str) -> str:
    """What a transcoder of `NORMALISED` has for an input norm."""
    norm = input_norm_of(lm_name)
    if norm is None or input_norm != "none":
        raise DictlearnError(
            f"{NORMALISED} is not supported here because the norm of model_name={lm_name!r} is not known by name, "
            "or there is another normalisation."
        )
    return norm


def _metadata(metadata: Mapping[str, Any], centred: bool) -> dict[str, Any]:
    found = {
        "lm_name": metadata.get("model_name"),
        "ctx": metadata.get("context_size"),
        "prepend_bos": metadata.get("prepend_bos"),
    }
    return found | ({"centred": True} if centred else {})


@torch.no_grad()
def _fold(made: Linear, growth: Tensor | None, *, rescale: bool, b_dec_on_input: bool) -> None:
    """What our forward rule does not have, in place: the gates' growth, rescaling by decoder norms, the bias."""
    if growth is not None:
        made.W_enc.mul_(growth)
    if rescale:
        norms = made.W_dec.norm(dim=-1)
        made.W_dec.div_(torch.where(norms > 0, norms, 1.0).unsqueeze(-1))
        made.scale_latents_(norms)
    if b_dec_on_input:
        made.b_enc.sub_(made.b_dec @ made.W_enc)

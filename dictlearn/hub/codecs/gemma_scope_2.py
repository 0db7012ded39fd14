"""Gemma Scope 2, of Gemma 3: `params.safetensors`, usually beside `config.json`; autoencoders and transcoders.

pre = x @ w_enc + b_enc; latents are relu(pre) where pre > threshold; recon = latents @ w_dec + b_dec + x @
affine_skip_connection. Sites are where the configuration says activations come from in the Hugging Face model;
without one, what the folder's name says. A transcoder reads what the MLP does: the norm's gain is in it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, load_tensors, read_json
from dictlearn.types import FormatError

WEIGHTS, CONFIG, SKIP = "params.safetensors", "config.json", "affine_skip_connection"
POINTS = {  # after "model.layers.LAYER." of the Hugging Face model
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}
FOLDERS = {
    "resid_post": ("resid_post", "resid_post"),
    "attn_out": ("attn_z", "attn_z"),  # the input of the output projection, by its name
    "mlp_out": ("mlp_out", "mlp_out"),
    "transcoder": ("mlp_in", "mlp_out"),
}


class GemmaScope2:
    """Gemma Scope 2: residual, MLP and attention autoencoders, and transcoders with and without a skip path."""

    layout: ClassVar[str] = f"{WEIGHTS} with w_enc and threshold"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS)

    def matches(self, files: Files, place: str) -> bool:
        return True  # no other format has a file of this name

    def read(self, files: Files, place: str) -> Dictionary:
        path, config = files.path(posixpath.join(place, WEIGHTS)), posixpath.join(place, CONFIG)
        w = load_tensors(path)
        d, n = encoder_sizes(path, w, "w_enc")
        width = w["w_dec"].shape[-1] if "w_dec" in w and w["w_dec"].ndim == 2 else d
        shapes = {"w_enc": (d, n), "b_enc": (n,), "w_dec": (n, width), "b_dec": (width,), "threshold": (n,)}
        check_tensors(path, w, shapes | ({SKIP: (d, width)} if SKIP in w else {}))
        cfg = read_json(files.path(config)) if config in files.names else {}
        if (kind := cfg.get("architecture", "jump_relu")) != "jump_relu":
            raise FormatError(f"{files.place(config)}: architecture must be jump_relu, got {kind!r}.")
        read, write = _sites(cfg, f"{files.where}/{place}".rstrip("/"))
        skip = w[SKIP].T if SKIP in w else None
        weights = Weights(w["w_enc"], w["b_enc"], w["w_dec"], w["b_dec"], w["threshold"], skip)
        lm = _lm_name(str(files.source.get("repo", files.where)))
        return linear(weights, None, read, write, metadata={"lm_name": lm, "prepend_bos": True})


def _sites(cfg: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Of the points of the configuration, else of the folder's name; else "x", or "x" and "y"."""
    points = [_point(cfg.get(key)) for key in ("hf_hook_point_in", "hf_hook_point_out")]
    if points[0] and points[1]:
        return points[0], points[1]
    found = re.search(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d+)_", where)
    if found is None:
        return "x", "x"
    read, write = FOLDERS[found[1]]
    return f"{read}.{found[2]}", f"{write}.{found[2]}"


def _point(name: object) -> str | None:
    found = (
        re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", name) if isinstance(name, str) else None
    )
    return f"{POINTS[found[2]]}.{found[1]}" if found and found[2] in POINTS else None


def _lm_name(where: str) -> str | None:
    found = re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)(?![\w-])", where)
    if found is None:
        return None
    kind = "" if found.groups() == ("270m", "pt") else f"-{found[2]}"
    return f"google/gemma-3-{found[1]}{kind}"

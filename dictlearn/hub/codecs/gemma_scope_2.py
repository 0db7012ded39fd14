"""Gemma Scope 2, of Gemma 3: `params.safetensors`, usually beside `config.json`; autoencoders and transcoders. Of a
cross-layer transcoder each layer has a file, `params_layer_LAYER.safetensors`.

pre = x @ w_enc + b_enc; latents are relu(pre) where pre > threshold; recon = latents @ w_dec + b_dec + x @
affine_skip_connection. Sites are where the configuration says activations come from in the Hugging Face model;
without one, what the folder's name says. A transcoder reads what the MLP does: the norm's gain is in it. In a
cross-layer transcoder w_dec is [n_latents, n_layers, d_out], of which a layer writes those from itself on.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import LayerSizes, Weights, cross_layer, linear
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, load_tensors, read_json, read_shapes
from dictlearn.types import FormatError

LAYER = "params_layer_{}.safetensors"
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
    """Residual, MLP and attention autoencoders, (cross-layer) transcoders with and without a skip path."""

    layout: ClassVar[str] = f"{WEIGHTS}, or {LAYER.format('LAYER')}, with w_enc and threshold"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS) + folders_with(names, LAYER.format(0))

    def matches(self, files: Files, place: str) -> bool:
        return True  # no other format has files of these names

    def read(self, files: Files, place: str) -> Dictionary:
        if posixpath.join(place, LAYER.format(0)) in files.names:
            return _read_cross_layer(files, place)
        path, config = files.path(posixpath.join(place, WEIGHTS)), posixpath.join(place, CONFIG)
        w = load_tensors(path)
        d, n = encoder_sizes(path, w, "w_enc")
        width = w["w_dec"].shape[-1] if "w_dec" in w and w["w_dec"].ndim == 2 else d
        shapes = {"w_enc": (d, n), "b_enc": (n,), "w_dec": (n, width), "b_dec": (width,), "threshold": (n,)}
        check_tensors(path, w, shapes | ({SKIP: (d, width)} if SKIP in w else {}))
        cfg = read_json(files.path(config)) if config in files.names else {}
        if (kind := cfg.get("architecture", "jump_relu")) != "jump_relu":
            raise FormatError(f"{files.place(config)}: architecture must be jump_relu, got {kind!r}.")
        read, write = _sites(cfg, files.origin(place), autoencoder=width == d and SKIP not in w)
        skip = w[SKIP].T if SKIP in w else None
        weights = Weights(w["w_enc"], w["b_enc"], w["w_dec"], w["b_dec"], w["threshold"], skip)
        return linear(path, weights, None, read, write, metadata=_metadata(files, cfg))


def _read_cross_layer(files: Files, place: str) -> Dictionary:
    pattern = re.compile(re.escape(posixpath.join(place, LAYER)).replace(r"\{\}", r"(\d+)"))
    layers = sorted(int(found[1]) for name in files.names if (found := pattern.fullmatch(name)))
    if layers != list(range(len(layers))):
        raise FormatError(
            f"{files.place(place)} must hold {LAYER.format('LAYER')} of every layer, it has {layers}."
        )
    paths = [files.path(posixpath.join(place, LAYER.format(layer))) for layer in layers]
    first = read_shapes(paths[0])
    w_enc, w_dec = first.get("w_enc", ()), first.get("w_dec", ())
    if len(w_enc) != 2 or len(w_dec) != 3:
        raise FormatError(f"{paths[0]} must hold w_enc with two axes and w_dec with three; it holds {first}.")
    sizes = LayerSizes(w_enc[0], w_dec[2], w_enc[1])
    reads, writes = ([f"{kind}.{layer}" for layer in layers] for kind in FOLDERS["transcoder"])
    skip, metadata = SKIP in first, _metadata(files, {})
    return cross_layer(
        paths[0], sizes, _layers(paths, sizes, skip), None, reads, writes, skip=skip, metadata=metadata
    )


def _layers(paths: Sequence[Path], sizes: LayerSizes, skip: bool) -> Iterator[Weights]:
    """Layer by layer, checked."""
    d_in, d_out, n = sizes
    shapes = {"w_enc": (d_in, n), "b_enc": (n,), "w_dec": (n, len(paths), d_out), "b_dec": (d_out,)}
    shapes |= {"threshold": (n,)} | ({SKIP: (d_in, d_out)} if skip else {})
    for layer, path in enumerate(paths):
        w = load_tensors(path)
        check_tensors(path, w, shapes)
        W_skip = w[SKIP].T if skip else None
        yield Weights(w["w_enc"], w["b_enc"], w["w_dec"][:, layer:], w["b_dec"], w["threshold"], W_skip)


def _metadata(files: Files, cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {"lm_name": _lm_name(files.origin("")) or _lm_of(cfg.get("model_name")), "prepend_bos": True}


def _sites(cfg: Mapping[str, Any], where: str, autoencoder: bool) -> tuple[str, str]:
    """Of the points of the configuration, else of the folder's name; else "x", and "y" where it can be none.

    autoencoder: its tensors are those of one.
    """
    points = [_point(cfg.get(key)) for key in ("hf_hook_point_in", "hf_hook_point_out")]
    if points[0] and points[1]:
        return points[0], points[1]
    found = re.search(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d+)_", where)
    if found is None:
        return "x", "x" if autoencoder and cfg.get("hf_hook_point_in") == cfg.get("hf_hook_point_out") else "y"
    read, write = FOLDERS[found[1]]
    return f"{read}.{found[2]}", f"{write}.{found[2]}"


def _point(name: object) -> str | None:
    found = (
        re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", name) if isinstance(name, str) else None
    )
    return f"{POINTS[found[2]]}.{found[1]}" if found and found[2] in POINTS else None


def _lm_of(name: object) -> str | None:
    """`model_name` of the configuration, which may be as the trainers call it, gemma-v3-1b-it."""
    found = re.fullmatch(r"(?:google/)?gemma-(?:v3|3)-([\w-]+)", name) if isinstance(name, str) else None
    return f"google/gemma-3-{found[1]}" if found else None


def _lm_name(where: str) -> str | None:
    found = re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)(?![\w-])", where)
    if found is None:
        return None
    kind = "" if found.groups() == ("270m", "pt") else f"-{found[2]}"
    return f"google/gemma-3-{found[1]}{kind}"

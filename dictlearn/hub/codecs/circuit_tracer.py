"""circuit-tracer: transcoders of layers, `layer_LAYER.safetensors` beside a `config.yaml` (Hanna et al. 2025).

pre = x @ W_enc.T + b_enc, with W_enc stored as [n_latents, d_in]; latents are its ReLU, those above
`activation_function.threshold`, or the k largest; recon = latents @ W_dec + b_dec + x @ W_skip.T. The configuration
names where activations are read and written.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from torch import Tensor

from dictlearn.choices import is_count
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, load_tensors
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError

NAME, CONFIG = re.compile(r"layer_(\d+)\.safetensors"), "config.yaml"
THRESHOLD = "activation_function.threshold"
KIND = "transcoder_set"
HOOKS = {
    "mlp.hook_in": "mlp_in",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
}
NORMALISED = "ln2.hook_normalized"


class CircuitTracer:
    """ReLU, JumpReLU and TopK transcoders, with and without a skip path."""

    layout: ClassVar[str] = f"layer_LAYER.safetensors with W_enc, beside {CONFIG} of a {KIND}"

    def find(self, names: Sequence[str]) -> list[str]:
        present = set(names)
        return [name for name in names if NAME.fullmatch(posixpath.basename(name)) and _config(name) in present]

    def matches(self, files: Files, place: str) -> bool:
        return read_yaml(files.path(_config(place))).get("model_kind", KIND) == KIND

    def read(self, files: Files, place: str) -> Dictionary:
        path, config = files.path(place), files.path(_config(place))
        cfg, w = read_yaml(config), load_tensors(path)
        n, d = encoder_sizes(path, w, "W_enc")
        width = w["W_dec"].shape[-1] if "W_dec" in w and w["W_dec"].ndim == 2 else d
        shapes = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, width), "b_dec": (width,)}
        optional = {"W_skip": (width, d), THRESHOLD: (n,), "k": tuple(w["k"].shape) if "k" in w else ()}
        check_tensors(path, w, shapes | {key: shape for key, shape in optional.items() if key in w})
        layer = NAME.fullmatch(posixpath.basename(place))
        read, write = (_site(config, cfg, key, layer[1] if layer else "0") for key in ("input", "output"))
        weights = Weights(w["W_enc"].T, w["b_enc"], w["W_dec"], w["b_dec"], w.get(THRESHOLD), w.get("W_skip"))
        lm = cfg.get("model_name")
        metadata = {"lm_name": lm if isinstance(lm, str) else None, "prepend_bos": True}
        return linear(weights, _sparsifier(path, w, n), read, write, metadata=metadata)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of plain values. Raises FormatError where there is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise FormatError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a mapping, found {type(content).__name__}.")
    return content


def _config(place: str) -> str:
    return posixpath.join(posixpath.dirname(place), CONFIG)


def _sparsifier(path: Path, w: Mapping[str, Tensor], n_latents: int) -> Sparsifier | None:
    """None where there are thresholds."""
    if "k" not in w:
        return None if THRESHOLD in w else ReLU(l1=0.0)
    k = w["k"].item() if w["k"].numel() == 1 else None
    if THRESHOLD in w or not is_count(k, 1):
        raise FormatError(f"{path}: k must be one whole number from 1, without thresholds; got {k!r}.")
    assert k is not None
    sparsifier = TopK(int(k))
    try:
        sparsifier.bind(n_latents)
    except DictlearnError as error:
        raise FormatError(f"{path}: {error}") from None
    return sparsifier


def _site(config: Path, cfg: Mapping[str, Any], end: str, layer: str) -> str:
    hook = cfg.get(f"feature_{end}_hook")
    if hook == NORMALISED:
        raise FormatError(
            f"{config}: feature_{end}_hook={hook} is not supported because no site has the activations between the "
            "normalisation and its gain."
        )
    if not isinstance(hook, str) or hook not in HOOKS:
        raise FormatError(f"{config}: feature_{end}_hook must be one of {', '.join(HOOKS)}, got {hook!r}.")
    return f"{HOOKS[hook]}.{layer}"

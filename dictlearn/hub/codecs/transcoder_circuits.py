"""transcoder_circuits (Dunefsky et al. 2024, arXiv 2406.11944): MLP transcoders of GPT-2, one torch file each.

latents = relu((x~ - b_dec) @ W_enc + b_enc); recon = latents @ W_dec + b_dec_out. x~ is `ln2.hook_normalized`:
the residual stream before the MLP, layer-normed without gain and bias. The target is the MLP's output in a model
whose writing weights are centred: without its mean over the width, which no later layer norm sees.

Beside the weights the file holds the training's configuration, a Python object. Its class is stood in for by one
that keeps what it is given and runs nothing; a file that names any other class or function is refused.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dictlearn.choices import is_count
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, read_torch
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import FormatError

NAME = re.compile(r"(?:.*_)?sparse_autoencoder_.+_blocks\.\d+\..+_\d+\.pt")
CONFIG_CLASS = "sae_training.config.LanguageModelSAERunnerConfig"
HOOK = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")


class _Attributes:
    """What a pickle makes in place of an object: its attributes, as plain values."""

    attributes: object = None

    def __new__(cls, *_: object) -> _Attributes:
        return super().__new__(cls)

    def __setstate__(self, attributes: object) -> None:
        self.attributes = attributes


class TranscoderCircuits:
    """ReLU transcoders of MLPs."""

    layout: ClassVar[str] = "NAME_sparse_autoencoder_LM_blocks.LAYER.HOOK_N.pt with `cfg` and `state_dict`"

    def find(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if NAME.fullmatch(posixpath.basename(name))]

    def matches(self, files: Files, place: str) -> bool:
        return {"cfg", "state_dict"} <= set(read_pickle(files.path(place)))

    def read(self, files: Files, place: str) -> Dictionary:
        path = files.path(place)
        content = read_pickle(path)
        cfg, w = _attributes(path, content["cfg"]), content["state_dict"]
        if not isinstance(w, Mapping):
            raise FormatError(f"{path}: state_dict must be a mapping, found {type(w).__name__}.")
        d, n = encoder_sizes(path, w, "W_enc")
        stored = w.get("W_dec")
        width = stored.shape[-1] if isinstance(stored, Tensor) and stored.ndim == 2 else d
        shapes = {"W_enc": (d, n), "b_enc": (n,), "b_dec": (d,), "W_dec": (n, width), "b_dec_out": (width,)}
        check_tensors(path, w, shapes)
        read, write = _sites(path, cfg)
        b_enc = w["b_enc"].float() - w["b_dec"].float() @ w["W_enc"].float()
        weights = Weights(w["W_enc"], b_enc, w["W_dec"], w["b_dec_out"])
        name, ctx = cfg.get("model_name"), cfg.get("context_size")
        metadata = {
            "lm_name": name if isinstance(name, str) else None,
            "ctx": ctx if is_count(ctx, 1) else None,
            "prepend_bos": True,
        }
        return linear(path, weights, ReLU(l1=0.0), read, write, input_norm="lm_layer_norm", metadata=metadata)


def read_pickle(path: Path) -> dict[str, Any]:
    """The mapping in the file. Raises FormatError where code would have to be run."""
    with torch.serialization.safe_globals([(_Attributes, CONFIG_CLASS)]):
        return read_torch(path)


def _attributes(path: Path, cfg: object) -> Mapping[Any, Any]:
    found = cfg.attributes if isinstance(cfg, _Attributes) else cfg
    if not isinstance(found, Mapping):
        raise FormatError(f"{path}: cfg must have attributes, found {type(found).__name__}.")
    return found


def _sites(path: Path, cfg: Mapping[Any, Any]) -> tuple[str, str]:
    """The read and the write site: the residual stream that the norm takes, and the output of the same MLP."""
    if cfg.get("is_transcoder") is not True:
        raise FormatError(
            f"{path}: cfg.is_transcoder={cfg.get('is_transcoder')!r} is not supported because of such pickles only "
            "transcoders are read, of which there are no other files: let SAELens save an autoencoder as cfg.json "
            "and sae_weights.safetensors."
        )
    read, write = cfg.get("hook_point"), cfg.get("out_hook_point")
    found = HOOK.fullmatch(read) if isinstance(read, str) else None
    if found is None:
        raise FormatError(
            f"{path}: cfg.hook_point={read!r} is not supported because no release has it; it must be "
            "blocks.LAYER.ln2.hook_normalized."
        )
    if write != f"blocks.{found[1]}.hook_mlp_out":
        raise FormatError(f"{path}: cfg.out_hook_point must be blocks.{found[1]}.hook_mlp_out, got {write!r}.")
    return f"resid_mid.{found[1]}", f"mlp_out.{found[1]}"

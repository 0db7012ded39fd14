"""circuit-tracer: `to_safetensors`, and its loader of sets and cross-layer transcoders that are on disk.

It writes no configuration; authors of sets write it by hand, in the words that its loader reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.utils.caching import load_transcoders_from_cache
from formats_worker import N_LATENTS, N_LAYERS, D, K, randomise
from torch import Tensor

SHAPE = (N_LAYERS, D)
SIZES: dict[str, Any] = {"d_model": D, "d_transcoder": N_LATENTS, "dtype": torch.float32}
WRITE = "hook_mlp_out"
Made = TranscoderSet | CrossLayerTranscoder


def jump_relu() -> JumpReLU:
    return JumpReLU(torch.ones(N_LATENTS), 0.1)


def transcoders(activation: Callable[[], Any], read: str = "mlp.hook_in", skip: bool = False) -> TranscoderSet:
    layers = {
        layer: SingleLayerTranscoder(
            activation_function=activation(), layer_idx=layer, skip_connection=skip, **SIZES
        )
        for layer in range(N_LAYERS)
    }
    made = TranscoderSet(layers, read, WRITE)
    randomise(made)
    return made


def cross_layer(activation: str, read: str = "hook_resid_mid") -> CrossLayerTranscoder:
    made = CrossLayerTranscoder(
        N_LAYERS, activation_function=activation, feature_input_hook=read, lazy_decoder=False, **SIZES
    )
    randomise(made)
    return made


def below_0(make: Callable[[], Made]) -> Made:
    made = make()
    for name, parameter in made.named_parameters():
        if name.endswith("threshold"):
            parameter.neg_()
    return made


KINDS: dict[str, Callable[[], Made]] = {}
for read in ("mlp.hook_in", "hook_resid_mid"):
    for name, activation in {"ReLU": lambda: F.relu, "JumpReLU": jump_relu}.items():
        KINDS[f"{name} set, {read}"] = partial(transcoders, activation, read)
        KINDS[f"{name} set with skip, {read}"] = partial(transcoders, activation, read, skip=True)
    KINDS[f"ReLU cross-layer, {read}"] = partial(cross_layer, "relu", read)
    KINDS[f"JumpReLU cross-layer, {read}"] = partial(cross_layer, "jump_relu", read)
KINDS["TopK set"] = partial(transcoders, partial(TopK, K))
KINDS["JumpReLU set (thresholds below 0)"] = partial(below_0, partial(transcoders, jump_relu))
KINDS["JumpReLU cross-layer (thresholds below 0)"] = partial(below_0, partial(cross_layer, "jump_relu"))


def save(made: Made, folder: Path) -> Made:
    made.to_safetensors(str(folder))
    one_layer = isinstance(made, TranscoderSet)
    cfg = {
        "model_name": "gpt2",
        "model_kind": "transcoder_set" if one_layer else "cross_layer_transcoder",
        "feature_input_hook": made.feature_input_hook,
        "feature_output_hook": made.feature_output_hook,
    }
    if one_layer and isinstance(made[0].activation_function, TopK):
        cfg |= {"activation": "topk", "k": K}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    return made


def load(folder: Path) -> Made:
    return load_transcoders_from_cache(folder.name, cache_dir=folder.parent)[0]


def compute(made: Made, x: Tensor) -> tuple[Tensor, Tensor]:
    """Its layers come first; of latents, ours are side by side."""
    acts = x.transpose(0, 1)
    latents = made.encode(acts)
    return latents.transpose(0, 1).flatten(1), made.decode(latents, acts).transpose(0, 1)
